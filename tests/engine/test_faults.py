"""Errors in the middle of a step end the requests of that step; the engine goes on."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nbllm import RequestFailedError, SamplingParams
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
    ["scheduler.schedule", "scheduler.advance", "runner.batch.prepare", "runner._sample"],
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


class NoMemoryAt(TorchDispatchMode):
    """The n-th new tensor from now on can't be had, nor, if `lasting`, any later one."""

    def __init__(self, at: int, *, lasting: bool) -> None:
        super().__init__()
        self.remaining = at
        self.lasting = lasting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        is_new = func is torch.ops.aten.lift_fresh.default  # how torch.tensor(...) ends
        if is_new or any(t.untyped_storage()._cdata not in known for t in tensors(result)):
            self.remaining -= 1
            if self.remaining == 0 or (self.lasting and self.remaining < 0):
                raise torch.OutOfMemoryError("injected")
        return result


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.0, "frequency_penalty": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 1.0, "logprob_token_ids": [7, 8]},
    {"temperature": 0.0, "logit_bias": {7: 3.0}, "min_tokens": 4, "stop_token_ids": [9]},
    {"temperature": 1.0, "allowed_token_ids": [3, 4, 5]},
]


def requests_of_all_kinds(make_request: MakeRequest) -> list[Request]:
    return [
        make_request(
            prompt,
            max_tokens=6,
            seed=seed,
            params=SamplingParams(ignore_eos=True, **kind),
            bad_words_token_ids=[[seed + 2], [seed + 3, 4]],
        )
        for seed, (prompt, kind) in enumerate(zip(prompts(), KINDS, strict=True))
    ]


def run_without_memory(
    engine: Engine, make_request: MakeRequest, fault: NoMemoryAt
) -> list[Request]:
    """Requests of all kinds, in an engine as good as new, until the step with the fault is over."""
    engine.block_manager.drop_cached_prefixes()
    engine.runner.batch._penalties = None
    requests = requests_of_all_kinds(make_request)
    for request in requests:
        engine.add(request)
    while engine.has_requests and fault.remaining > 0:
        with fault:
            engine.step()
    return requests


def exhaust_memory(make_engine: MakeEngine, make_request: MakeRequest, num_points: int) -> None:
    engine = make_engine(**OPTIONS, num_gpu_blocks_override=17)  # so few that some are preempted
    no_fault = NoMemoryAt(1 << 60, lasting=False)
    expected = [r.output_token_ids for r in run_without_memory(engine, make_request, no_fault)]
    num_allocations = (1 << 60) - no_fault.remaining
    rng = random.Random(2)
    for at in rng.sample(range(1, num_allocations + 1), num_points):
        fault = NoMemoryAt(at, lasting=rng.random() < 0.5)
        requests = run_without_memory(engine, make_request, fault)
        assert fault.remaining <= 0
        failed = [request for request in requests if request.error is not None]
        assert 0 < len(failed) <= OPTIONS["max_num_seqs"], at
        for request in failed:
            assert isinstance(request.error, RequestFailedError)
            assert isinstance(request.error.__cause__, torch.OutOfMemoryError)
            assert "OutOfMemoryError" in str(request.error)
        again = requests_of_all_kinds(make_request)
        again = [a for a, request in zip(again, requests, strict=True) if request in failed]
        for request in again:
            engine.add(request)
        run(engine)
        repeated = iter(again)
        for request, tokens in zip(requests, expected, strict=True):
            right = next(repeated) if request in failed else request
            assert right.output_token_ids == tokens, at
            assert len(right.prompt_logprobs) in (0, right.num_prompt_tokens)
        assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks
        assert not engine.runner.batch.rows


def test_a_tensor_that_finds_no_memory_fails_only_the_requests_of_its_step(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    exhaust_memory(make_engine, make_request, num_points=20)


@pytest.mark.slow
def test_two_hundred_tensors_that_find_no_memory(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    exhaust_memory(make_engine, make_request, num_points=200)


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
