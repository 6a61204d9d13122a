"""Steps of nobody: run for the kernels that they compile, and for nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from nbllm import SamplingParams
from nbllm.config import EngineConfig
from nbllm.engine.compile_ahead import compile_ahead
from nbllm.engine.engine import Engine
from nbllm.engine.loading import load_engine
from nbllm.engine.request import Request

MakeCheckpoint = Callable[..., tuple[Path, Any]]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 128}


def snapshot(engine: Engine) -> list[torch.Tensor]:
    """All that a step could change."""
    state = engine.runner.batch.state
    tables = [getattr(state, field.name) for field in fields(state)]
    return copy.deepcopy([*tables, *engine.runner.kv_caches])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Gemma2", "Gemma3Text", "OPT"])
def test_a_step_of_nobody_changes_nothing(
    make_checkpoint: MakeCheckpoint,
    make_request: Callable[..., Request],
    architecture: str,
    dtype: str,
) -> None:
    options = OPTIONS | {"dtype": dtype}
    engine = load_engine(make_checkpoint(architecture)[0], EngineConfig(**options)).engine
    before = snapshot(engine)
    assert bool(engine.runner.later_rehearsals()) == (dtype != "float32")
    with compile_ahead(engine.runner):
        pass
    for rehearse in engine.runner.later_rehearsals():
        rehearse()
    assert all(map(torch.equal, before, snapshot(engine)))
    texts = []
    for number in range(2):
        request = make_request([5, 6, 7, 8], max_tokens=6)
        engine.add(request)
        while engine.has_requests:
            engine.step()
        texts.append(request.output_token_ids)
        if number == 0:
            with compile_ahead(engine.runner):
                pass
    assert texts[0] == texts[1] and len(texts[0]) == 6
    later = engine.runner.later_rehearsals()
    engine.release()
    for rehearse in later:
        rehearse()  # and finds nothing to do


def test_weights_may_hold_anything_meanwhile(make_checkpoint: MakeCheckpoint) -> None:
    engine = load_engine(make_checkpoint("Qwen3")[0], EngineConfig(**OPTIONS)).engine
    before = snapshot(engine)
    for parameter in engine.runner.model.parameters():
        parameter.data.fill_(torch.nan)
    for rehearse in engine.runner.rehearsals() + engine.runner.later_rehearsals():
        rehearse()
    assert all(map(torch.equal, before, snapshot(engine)))


def test_a_failure_is_left_to_the_step_that_somebody_waits_for(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(make_checkpoint("Qwen3")[0], EngineConfig(**OPTIONS)).engine

    def broken() -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "rehearsals", lambda: [broken])
    with compile_ahead(engine.runner):
        pass
    with pytest.raises(KeyError), compile_ahead(engine.runner):  # the caller's own is not lost
        raise KeyError


@pytest.mark.gpu
def test_nothing_is_left_to_compile_for_the_first_texts_and_batches(
    make_checkpoint: MakeCheckpoint,
    make_request: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton import knobs

    # Nothing in the background: what it would do is done here.
    monkeypatch.setattr("nbllm.engine.loading.compile_later", lambda runner: None)
    folder, _ = make_checkpoint("Qwen3", head_dim=64, num_hidden_layers=2)
    options = OPTIONS | {"device": "cuda", "dtype": "bfloat16", "max_model_len": 512}
    engine = load_engine(folder, EngineConfig(**options)).engine
    compiled: set[str] = set()

    def record(*_: Any, fn: Any, **__: Any) -> None:
        compiled.add(fn.name)

    def run(num_rows: int, length: int, params: SamplingParams) -> None:
        for _ in range(num_rows):
            engine.add(make_request(list(range(2, 2 + length)), max_tokens=24, params=params))
        while engine.has_requests:
            engine.step()

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    for temperature, top_p in [(0.0, 1.0), (0.7, 1.0), (0.7, 0.9)]:
        params = SamplingParams(temperature=temperature, top_p=top_p, ignore_eos=True)
        run(1, 7, params)
        run(1, 100, params)
    assert compiled == set()
    for rehearse in engine.runner.later_rehearsals():
        rehearse()
    compiled.clear()
    for num_rows in (2, 4, 8, 16):
        run(num_rows, 100, params)
    assert compiled == set()
    engine.release()
