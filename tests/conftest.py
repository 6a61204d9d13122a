"""Tiny random checkpoints, written by transformers, which is also the reference."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The models are tiny: a second thread costs more than it brings. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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

CLASS_NAMES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}

MakeCheckpoint = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeCheckpoint]:
    """(folder, transformers model) of a named architecture with random float32 weights."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str, **overrides: Any) -> tuple[Path, Any]:
        key = f"{name}-{sorted(overrides.items())}"
        if key not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**(SHAPE | overrides))
            class_name = CLASS_NAMES.get(name, f"{name}ForCausalLM")
            model = getattr(transformers, class_name)(config).eval().float()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            if not made:
                gc.collect()
                gc.freeze()  # transformers: a million objects that every collection would walk
            made[key] = folder, model
        return made[key]

    yield make
    gc.unfreeze()


@pytest.fixture(scope="session")
def generate_greedily() -> Callable[..., list[int]]:
    """(model, prompt, number of tokens) -> what transformers appends, with its KV cache.

    The loop of `generate` without its overhead, which is many times the tiny models' own work.
    """

    def generate(model: Any, prompt: list[int], num_tokens: int = 16) -> list[int]:
        tokens: list[int] = []
        cache = None
        with torch.inference_mode():
            model(torch.tensor([[0]]), use_cache=False)  # a short text resets "dynamic" rope
            while len(tokens) < num_tokens:
                new = prompt if cache is None else tokens[-1:]
                output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                tokens.append(int(output.logits[0, -1].argmax()))
        return tokens

    return generate


@pytest.fixture(autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    yield
    gc.collect()
