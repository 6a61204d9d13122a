"""Engines without a thread, driven step by step by the tests."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from nbllm import SamplingParams
from nbllm.config import EngineConfig
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.engine import Engine
from nbllm.engine.loading import load_engine
from nbllm.engine.request import Request

_ids = count()


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """A request as `RequestFactory` would make it."""

    def make(prompt: list[int], max_tokens: int = 8, **options: Any) -> Request:
        params = options.pop("params", None) or SamplingParams(temperature=0.0, ignore_eos=True)
        return Request(
            request_id=f"r{next(_ids)}",
            token_ids=array("I", prompt),
            num_prompt_tokens=len(prompt),
            sampling_params=params,
            max_tokens=max_tokens,
            seed=options.pop("seed", 0),
            **options,
        )

    return make


@pytest.fixture
def make_replaying_engine(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    """An engine on the CPU that takes the ways of a GPU: captured steps, several in a row, ahead of
    their results."""

    def make(**options: Any) -> Engine:
        engine = make_engine(**options)
        engine.runner.graphs.is_enabled = True
        engine.runner.max_steps, engine.runner.max_pending_steps = 8, 2
        return engine

    # What a CUDA graph does, where there is none: the same work on the same buffers. A real capture
    # only records, too, and the replay that follows does the work for the first time.
    monkeypatch.setattr(GraphCache, "_record", lambda _, work: work)
    return make


@pytest.fixture
def make_engine(make_checkpoint: Callable[..., Any]) -> Callable[..., Engine]:
    """An engine over a tiny Qwen 3 that checks its accounting after every step."""

    def make(**options: Any) -> Engine:
        folder, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)
        options = {"device": "cpu", "dtype": "float32", "block_size": 8} | options
        engine = load_engine(folder, EngineConfig(**options)).engine
        engine.check_integrity = True
        return engine

    return make
