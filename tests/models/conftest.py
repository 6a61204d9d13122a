"""The one check that every architecture has to pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbllm import LLM, SamplingParams

PROMPT_LENS = (1, 5, 17, 33, 100, 64)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture
def check_greedy_tokens(
    generate_greedily: Callable[..., list[int]], device: str
) -> Callable[..., None]:
    """Batched, chunked, prefix-cached and alone, a checkpoint gives the reference's tokens."""

    def check(folder: Path, model: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in PROMPT_LENS]
        references = [generate_greedily(model, prompt) for prompt in prompts]
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "device": device,
            "block_size": 16,
            "max_num_seqs": 8,  # a step holds as many tokens at least
        }
        with LLM(folder, max_num_batched_tokens=64, **options) as llm:
            llm._thread._engine.check_integrity = True
            batched = llm.generate(prompts, GREEDY, use_tqdm=False)  # chunked, too: 64 a step
            assert [o.outputs[0].token_ids for o in batched] == references
            again = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert again[4].num_cached_tokens > 0
            assert [o.outputs[0].token_ids for o in again] == references
            alone = llm.generate(prompts[3], GREEDY)
            assert alone[0].outputs[0].token_ids == references[3]

    return check
