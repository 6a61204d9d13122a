"""Tiny random checkpoints, written by transformers, which is also the reference."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}

MakeCheckpoint = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """(folder, transformers model) of a named architecture with random float32 weights."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str, **overrides: Any) -> tuple[Path, Any]:
        key = f"{name}-{sorted(overrides.items())}"
        if key not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**(SHAPE | overrides))
            suffix = "ForCausalLM"
            config_name = name.removesuffix("Text")
            model = getattr(transformers, config_name + suffix)(config).eval().float()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[key] = folder, model
        return made[key]

    return make


@pytest.fixture(autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    yield
    gc.collect()
