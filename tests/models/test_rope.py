"""Rotary embeddings: every kind, on both sides of the length that the model was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbllm import LLM, SamplingParams
from nbllm.config import RopeConfig
from nbllm.models import rope as rope_module
from nbllm.models.rope import RotaryEmbedding
from nbllm_kernels import AttentionMetadata

ORIGINAL = 48
SHORT = [1.0 + 0.05 * i for i in range(8)]
LONG = [2.0 + 0.5 * i for i in range(8)]
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXTENDED = {"original_max_position_embeddings": ORIGINAL}
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}

# One line each: test id, class prefix in transformers, configuration.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("default", "Llama", {"max_position_embeddings": ORIGINAL}),
    ("linear", "Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama3", "Llama", {"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | EXTENDED}),
    ("yarn", "Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0} | EXTENDED}),
    (
        "yarn-mscale",
        "Qwen3",
        {
            "head_dim": 16,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale": 0.7}
            | {"mscale_all_dim": 1.2, "truncate": False}
            | EXTENDED,
        },
    ),
    (
        "dynamic",
        "Llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    ),
    (
        "longrope",
        "Phi3",
        {"sliding_window": None, "original_max_position_embeddings": ORIGINAL}
        | {"rope_scaling": LONGROPE},
    ),
    (
        "longrope-window",
        "Phi3",
        {"sliding_window": 20, "original_max_position_embeddings": ORIGINAL}
        | {"rope_scaling": LONGROPE},
    ),
]
LENS = (5, 40, 47, 48, 49, 60, 100)  # below, across and beyond the original length of 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 160,
    "block_size": 8,
}


def prefixes_of_one_text(lens: tuple[int, ...] = LENS) -> list[list[int]]:
    """Prompts that share all their pages with each other, where the rotations agree."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(2, 512, (max(lens),), generator=generator).tolist()
    return [text[:length] for length in lens]


@pytest.fixture
def reference(generate_greedily: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """As `generate` of transformers: the text is computed again when it outgrows the length."""

    def generate(model: Any, prompt: list[int], num_tokens: int = 16) -> list[int]:
        inside = ORIGINAL + 1 - len(prompt)
        if model.config.model_type != "phi3" or not 0 < inside < num_tokens:
            return generate_greedily(model, prompt, num_tokens)
        head = generate_greedily(model, prompt, inside)
        return head + generate_greedily(model, prompt + head, num_tokens - inside)

    return generate


@pytest.mark.parametrize(("name", "prefix", "config"), CASES, ids=[case[0] for case in CASES])
def test_greedy_tokens_equal_those_of_transformers_beyond_the_original_length(
    make_checkpoint: Callable[..., Any],
    reference: Callable[..., list[int]],
    name: str,
    prefix: str,
    config: dict[str, Any],
) -> None:
    folder, model = make_checkpoint(prefix, **config)
    prompts = prefixes_of_one_text()
    references = [reference(model, prompt) for prompt in prompts]
    with LLM(folder, max_num_batched_tokens=64, **OPTIONS) as llm:
        llm._thread._engine.check_integrity = True
        for order in (prompts, prompts[::-1]):  # from a cold, then from a warm cache
            outputs = llm.generate(order, GREEDY, use_tqdm=False)
            tokens = {len(o.prompt_token_ids): o.outputs[0].token_ids for o in outputs}
            assert [tokens[len(prompt)] for prompt in prompts] == references
        assert outputs[0].num_cached_tokens > 0
    with LLM(folder, num_gpu_blocks_override=28, **OPTIONS) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.get_metrics()["num_preemptions"] > 0
        assert [o.outputs[0].token_ids for o in outputs] == references
    with LLM(folder, enable_prefix_caching=False, **OPTIONS) as llm:
        params = SamplingParams(top_k=1, n=2, max_tokens=16, ignore_eos=True)
        for prompt, tokens_of_one in zip(prompts, references, strict=True):
            twins = llm.generate(prompt, params)[0].outputs
            assert [twin.token_ids for twin in twins] == [tokens_of_one] * 2


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_loop_of_the_reference_is_that_of_generate(
    make_checkpoint: Callable[..., Any], reference: Callable[..., list[int]], name: str
) -> None:
    [(prefix, config)] = [case[1:] for case in CASES if case[0] == name]
    _, model = make_checkpoint(prefix, **config)
    for prompt in prefixes_of_one_text((40, 60)):
        ids = torch.tensor([prompt])
        model(torch.tensor([[0]]))
        model.generation_config.eos_token_id = None
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )[0, len(prompt) :]
        assert tokens.tolist() == reference(model, prompt)


def test_a_step_over_a_huge_context_computes_the_rows_that_a_table_would_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positions = torch.tensor([0, 3, 60, 99, 47, 48, 70])
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, 4, 6, 7], dtype=torch.int32),
        seq_lens=torch.tensor([100, 49, 71], dtype=torch.int32),
        block_tables=torch.zeros(3, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(7, dtype=torch.int64),
        max_query_len=4,
        max_seq_len=100,
        num_decode_seqs=0,
        prompt_lens=torch.tensor([100, 49, 30]),
    )
    for rope_type, parameters in (("default", {}), ("longrope", LONGROPE)):
        rope = RopeConfig(
            rope_type=rope_type,
            theta=1e4,
            rotary_dim=16,
            max_position_embeddings=128,
            original_max_position_embeddings=ORIGINAL,
            parameters=dict(parameters),
        )
        table, rows = RotaryEmbedding(rope, 128, torch.device("cpu")).rows(positions, metadata)
        assert len(table) >= 128
        with monkeypatch.context() as patch:
            patch.setattr(rope_module, "_MAX_TABLE_BYTES", 0)
            computed = RotaryEmbedding(rope, 128, torch.device("cpu"))
        table_2, rows_2 = computed.rows(positions, metadata)
        assert len(table_2) == len(positions)
        torch.testing.assert_close(table[rows], table_2[rows_2], rtol=0, atol=0)
