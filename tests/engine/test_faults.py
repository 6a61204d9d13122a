"""Errors in the middle of a step end the requests of that step; the engine goes on."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nbllm import RequestFailedError
from nbllm.engine.engine import Engine
from nbllm.engine.request import FinishReason, Request

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]

OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64}


class FailAt(TorchDispatchMode):
    """The n-th operation of torch from now on raises."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.remaining = at
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.remaining -= 1
        if self.remaining == 0:
            raise self.error
        return func(*args, **(kwargs or {}))


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 500) for _ in range(rng.randrange(1, 40))] for _ in range(10)]


def run(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def solo_tokens(engine: Engine, make_request: MakeRequest) -> list[list[int]]:
    tokens = []
    for prompt in prompts():
        request = make_request(prompt)
        engine.add(request)
        run(engine)
        tokens.append(request.output_token_ids)
    return tokens


def inject(
    engine: Engine, make_request: MakeRequest, rng: random.Random, expected: list[list[int]]
) -> bool:
    """One error in a random step at a random operation; True if it hit."""
    requests = [make_request(prompt) for prompt in prompts()]
    for request in requests:
        engine.add(request)
    for _ in range(rng.randrange(8)):
        engine.step()
    kind = rng.choice([RuntimeError, torch.OutOfMemoryError, ValueError, MemoryError])
    error = kind("injected")
    finished_before = {r for r in requests if r.is_finished}
    with FailAt(rng.randrange(1, 150), error):
        engine.step()
    failed = [r for r in requests if r.finish_reason is FinishReason.ERROR]
    for request in failed:
        assert request not in finished_before
        assert isinstance(request.error, RequestFailedError)
        assert request.error.__cause__ is error
    assert len(failed) <= OPTIONS["max_num_seqs"]
    run(engine)
    for request, tokens in zip(requests, expected, strict=True):
        if request not in failed:
            assert request.output_token_ids == tokens
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks
    assert not engine.runner.batch.rows
    return bool(failed)


def inject_many(make_engine: MakeEngine, make_request: MakeRequest, hits: int) -> None:
    engine = make_engine(**OPTIONS)
    expected = solo_tokens(engine, make_request)
    rng = random.Random(1)
    while hits > 0:
        hits -= inject(engine, make_request, rng, expected)


def test_an_error_at_any_operation_fails_only_the_requests_of_its_step(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    inject_many(make_engine, make_request, hits=20)


@pytest.mark.slow
def test_two_hundred_errors_at_random_operations(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    inject_many(make_engine, make_request, hits=200)


@pytest.mark.parametrize(
    "place",
    ["scheduler.schedule", "scheduler.advance", "runner.batch.prepare", "runner.sampler"],
)
def test_an_error_in_any_part_of_a_step_leaves_the_engine_usable(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    engine = make_engine(**OPTIONS)
    owner: Any = engine
    *path, name = place.split(".")
    for attribute in path:
        owner = getattr(owner, attribute)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    bad = make_request([1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        engine.add(bad)
        assert engine.step() == [bad]
    assert isinstance(bad.error, RequestFailedError)
    good = make_request([1, 2, 3])
    engine.add(good)
    run(engine)
    assert good.finish_reason is FinishReason.LENGTH


def test_a_row_of_nan_fails_alone_and_leaves_no_nan_behind(
    make_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(**OPTIONS)
    expected = solo_tokens(engine, make_request)
    model: Any = engine.runner.model
    forward = model.forward
    poison = 499

    def poisoned(input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        hidden: torch.Tensor = forward(input_ids, *args)
        if not bool((input_ids == poison).any()):
            return hidden
        for cache in args[1]:  # the poisoned sequence's own pages
            cache[:, sorted(bad.block_table)] = torch.nan
        return torch.where((input_ids == poison)[:, None], torch.nan, hidden)

    monkeypatch.setattr(model, "forward", poisoned)
    bad = make_request([3, 4, poison])
    neighbours = [make_request(prompt) for prompt in prompts() if poison not in prompt]
    engine.add(bad)
    for request in neighbours:
        engine.add(request)
    run(engine)
    assert isinstance(bad.error, RequestFailedError)
    assert "NaN" in str(bad.error)
    kept = [tokens for p, tokens in zip(prompts(), expected, strict=True) if poison not in p]
    assert [r.output_token_ids for r in neighbours] == kept
    assert all(bool(torch.isfinite(cache).all()) for cache in engine.runner.kv_caches)


OUT_OF_RAM = """
import resource, sys
from nbllm import LLM, RequestFailedError, SamplingParams

folder = sys.argv[1]
llm = LLM(folder, skip_tokenizer_init=True, device="cpu", dtype="float32", max_num_seqs=4)
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
expected = llm.generate([5, 6, 7], params)[0].outputs[0].token_ids
scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
llm.generate([5, 6, 7], scored)  # libraries allocate at first use, and abort if they can't
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
try:
    llm.generate([5] * 250, scored)  # 250 rows of logits: 100 MB in one piece
    sys.exit("the limit did not bite")
except RequestFailedError as error:
    assert error.__cause__ is not None
assert llm.generate([5, 6, 7], params)[0].outputs[0].token_ids == expected
assert llm.is_healthy()
llm.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_request_that_exhausts_the_ram_fails_and_the_next_one_runs(
    make_checkpoint: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16, vocab_size=100_000, num_hidden_layers=1)
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_RAM, str(folder)], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
