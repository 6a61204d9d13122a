"""What is measured: prompts of random token ids, the same for every engine, and model shapes.

Random ids have no text in common and no natural end, so every engine does the same work. The
numbers are drawn from `random.Random(seed)`, which is the same on every machine and version.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_IDS = 10_000  # prompts use ids 0 .. 10,000, or as many as the model has


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and how many tokens to generate for each.

    Attributes:
        name: as on the command line.
        prompts: token ids of every row.
        output_lens: tokens to generate for every row, no more and no fewer.
    """

    name: str
    prompts: list[list[int]]
    output_lens: list[int]


def make_workload(
    name: str,
    *,
    num_prompts: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    vocab_size: int = _IDS + 1,
) -> Workload:
    """A named workload, or a smaller or larger one of its kind.

    Args:
        name: "single" (one stream, 128 tokens in, 512 out), "batch" (16 rows, 128 in, 32 out),
            "frame" (a DataFrame's column: 4,000 rows that share their first 512 tokens, 64 of
            their own, 32 out), "nano" (256 rows, 100 to 1,024 in and out) or "prefill" (64 rows,
            2,048 in, 1 out).
        num_prompts: rows.
        input_len: prompt tokens of each row; with "frame" those after the shared ones, with
            "nano" the largest.
        output_len: generated tokens of each row; with "nano" the largest.
        vocab_size: ids stay below it.

    Raises:
        ValueError: there is no such workload.
    """
    if name not in _DEFAULTS:
        raise ValueError(f"workload must be one of {', '.join(_DEFAULTS)}, got {name!r}")
    seed, rows, inputs, outputs, shared = _DEFAULTS[name]
    rows = num_prompts or rows
    inputs = input_len or inputs
    outputs = output_len or outputs
    rng = random.Random(seed)
    top = min(_IDS, vocab_size - 1)

    def ids(count: int) -> list[int]:
        return [rng.randint(0, top) for _ in range(count)]

    if name == "nano":
        prompts = [ids(rng.randint(min(100, inputs), inputs)) for _ in range(rows)]
        lens = [rng.randint(min(100, outputs), outputs) for _ in range(rows)]
        return Workload(name, prompts, lens)
    head = ids(shared)
    return Workload(name, [head + ids(inputs) for _ in range(rows)], [outputs] * rows)


# name -> seed, rows, prompt tokens, generated tokens, shared tokens before the prompt's own
_DEFAULTS = {
    "single": (2, 1, 128, 512, 0),
    "batch": (4, 16, 128, 32, 0),
    "frame": (1, 4000, 64, 32, 512),
    "nano": (0, 256, 1024, 1024, 0),
    "prefill": (3, 64, 2048, 1, 0),
}

WORKLOADS = tuple(_DEFAULTS)

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    },
    "llama-3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
    },
    "llama-3.1-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 8.0},
    },
}
"""config.json of well-known shapes, for runs with random weights where no model is at hand."""


def write_config(shape: str, folder: Path) -> Path:
    """Write config.json of one of `SHAPES` into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(SHAPES[shape], indent=1)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder
