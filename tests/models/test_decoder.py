"""Every architecture gives the tokens that transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbllm import LLM, SamplingParams

HEAD = {"head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA3 = HEAD | {
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
WINDOW = {"use_sliding_window": True, "sliding_window": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# One line each: test id, class prefix in transformers, configuration.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "Llama", HEAD),
    ("llama-linear", "Llama", HEAD | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama-llama3", "Llama", HEAD | {"rope_scaling": LLAMA3 | YARN | {"rope_type": "llama3"}}),
    ("llama-yarn", "Llama", HEAD | {"rope_scaling": YARN}),
    ("llama-bias", "Llama", HEAD | {"attention_bias": True, "mlp_bias": True}),
    ("llama-tied", "Llama", HEAD | {"tie_word_embeddings": True}),
    ("mistral-window", "Mistral", HEAD | {"sliding_window": 24}),
    ("qwen2", "Qwen2", {}),
    ("qwen2-window", "Qwen2", WINDOW | {"max_window_layers": 1}),
    ("qwen3-window", "Qwen3", HEAD | WINDOW | {"max_window_layers": 2}),
    ("qwen3", "Qwen3", HEAD),
    ("qwen3-wide-heads", "Qwen3", {"head_dim": 32}),
    ("phi3", "Phi3", {"sliding_window": None}),
    ("phi3-partial", "Phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    ("gemma2", "Gemma2", HEAD | {"sliding_window": 24, "query_pre_attn_scalar": 16}),
    (
        "gemma2-softcap",
        "Gemma2",
        HEAD
        | {"query_pre_attn_scalar": 4, "attn_implementation": "eager"}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    ("gemma3", "Gemma3Text", GEMMA3),
    (
        "gemma3-linear",
        "Gemma3Text",
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    ("smollm3", "SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    ("olmo2", "Olmo2", {}),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.mark.parametrize(("name", "prefix", "config"), CASES, ids=[case[0] for case in CASES])
def test_greedy_tokens_equal_those_of_transformers(
    make_checkpoint: Callable[..., Any],
    check_greedy_tokens: Callable[..., None],
    name: str,
    prefix: str,
    config: dict[str, Any],
) -> None:
    folder, model = make_checkpoint(prefix, **config)
    check_greedy_tokens(folder, model)


def test_preempted_sequences_come_to_the_same_tokens(
    make_checkpoint: Callable[..., Any],
    generate_greedily: Callable[..., list[int]],
    device: str,
) -> None:
    folder, model = make_checkpoint("Qwen3", **HEAD)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, 512, (40,), generator=generator).tolist() for _ in range(6)]
    with LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        device=device,
        block_size=8,
        num_gpu_blocks_override=16,
        max_model_len=96,
    ) as llm:
        llm._thread._engine.check_integrity = True
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.get_metrics()["num_preemptions"] > 0
        references = [generate_greedily(model, prompt) for prompt in prompts]
        assert [o.outputs[0].token_ids for o in outputs] == references
