"""Several steps in a row, and steps ahead of the last result, change nothing but the time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbllm import RequestFailedError, SamplingParams
from nbllm.config import EngineConfig
from nbllm.engine.cascade import Cascade
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.engine import Engine
from nbllm.engine.loading import load_engine
from nbllm.engine.request import FinishReason, Request
from nbllm.engine.scheduler_output import SchedulerOutput

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]
known_outcomes: dict[tuple[int, bool], Any] = {}  # the same for all tests
OPTIONS: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 40, "max_model_len": 96}


def make_jobs(
    seed: int, count: int = 14, *, on_device: bool = False
) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and how to continue them: all that ends a text, on the device or on the host.

    With `on_device`, nothing that the host has to say of the logits.
    """
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(1, 30))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            stop_token_ids=rng.sample(range(500), rng.choice([0, 5, 60])),
            min_tokens=0 if on_device else rng.choice([0, 0, 3]),
            logit_bias=None if on_device else rng.choice([None, None, {7: 3.0, 400: -9.0}]),
            allowed_token_ids=None if on_device else rng.choice([None, None, list(range(2, 300))]),
            presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
            logprobs=rng.choice([None, None, None, 0, 3]),
            ignore_eos=True,
        )
        max_tokens = rng.randrange(1, 40)
        jobs.append(
            (prompt, {"params": params, "max_tokens": max_tokens, "seed": rng.randrange(99)})
        )
    return jobs


def run(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def outcomes(requests: list[Request]) -> list[tuple[Any, ...]]:
    return [
        (r.output_token_ids, r.finish_reason, r.stop_reason, [list(x) for x in r.logprobs])
        for r in requests
    ]


@pytest.fixture
def expected(make_engine: MakeEngine, make_request: MakeRequest) -> Callable[..., Any]:
    """What each job gives alone, one step at a time."""

    def outcomes_alone(seed: int, on_device: bool = False) -> Any:
        if (seed, on_device) not in known_outcomes:
            engine = make_engine(**OPTIONS)
            jobs = make_jobs(seed, on_device=on_device)
            requests = [make_request(prompt, **options) for prompt, options in jobs]
            for request in requests:
                engine.add(request)
                run(engine)
            known_outcomes[seed, on_device] = outcomes(requests)
        return known_outcomes[seed, on_device]

    return outcomes_alone


@pytest.mark.parametrize(("max_steps", "max_pending"), [(1, 1), (1, 2), (3, 1), (8, 2), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 16}], ids=["roomy", "tight"])
def test_steps_in_a_row_and_ahead_give_the_tokens_of_single_steps(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    expected: Callable[..., Any],
    max_steps: int,
    max_pending: int,
    options: dict[str, Any],
) -> None:
    for seed in range(3):
        engine = make_engine(**(OPTIONS | options))
        engine.runner.max_steps = max_steps
        engine.runner.max_pending_steps = max_pending
        rng = random.Random(seed)
        requests = [make_request(prompt, **job) for prompt, job in make_jobs(seed)]
        for request in requests:
            engine.add(request)
            for _ in range(rng.randrange(3)):
                engine.step()
        run(engine)
        assert outcomes(requests) == expected(seed)
        assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks
        assert not engine.runner.batch.rows


@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 16}], ids=["roomy", "tight"])
def test_replayed_steps_give_the_tokens_of_single_steps(
    make_replaying_engine: MakeEngine,
    make_request: MakeRequest,
    expected: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    engine = make_replaying_engine(**(OPTIONS | options))
    for seed, on_device in [(0, True), (1, True), (2, False), (3, True)]:
        jobs = make_jobs(seed, on_device=on_device)
        requests = [make_request(prompt, **job) for prompt, job in jobs]
        for request in requests:
            engine.add(request)
        run(engine)
        assert outcomes(requests) == expected(seed, on_device=on_device)
    keys: Any = list(engine.runner.graphs._graphs)
    assert {key[0] for key in keys} == {"decode", "prompt"}
    # Where the host shapes logits, the graph ends before them.
    assert {key[0] for key in keys if key[2] is None} == {"decode", "prompt"}
    assert any(size.num_decodes for kind, size, *_ in keys if kind == "prompt")
    assert engine.runner.graphs.num_replays > 20
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks


def test_steps_in_a_row_take_no_longer_than_they_should(
    make_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(**OPTIONS)
    engine.runner.max_steps, engine.runner.max_launch_s = 8, 0.010
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run_steps = engine.runner.decode_loop.run
    in_a_row: list[int] = []

    def slow(output: SchedulerOutput) -> Any:
        in_a_row.append(output.num_steps)
        now[0] += 0.003 * output.num_steps
        return run_steps(output)

    monkeypatch.setattr(engine.runner.decode_loop, "run", slow)
    engine.add(make_request([5, 6, 7], max_tokens=21))
    run(engine)
    assert in_a_row == [8, 3, 3, 3, 3]


def check_six_texts(engine: Engine, make: Callable[[], Request]) -> None:
    """One after the other they are the same, whatever is captured in between."""
    requests = [make() for _ in range(6)]
    for request in requests:
        engine.add(request)
        run(engine)
    texts = [request.output_token_ids for request in requests]
    assert texts == [texts[0]] * 6


@pytest.mark.parametrize("num_failures", [1, 2, 3])
def test_a_capture_that_fails_is_made_later_or_given_up_and_costs_no_token(
    make_replaying_engine: MakeEngine,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    num_failures: int,
) -> None:
    engine = make_replaying_engine(**OPTIONS, enable_prefix_caching=False)
    record, failures = GraphCache._record, [0]

    def disturbed(graphs: GraphCache, work: Callable[[], None]) -> Any:
        if failures[0] < num_failures:
            failures[0] += 1
            raise torch.AcceleratorError("injected: somebody synchronized the device")
        return record(graphs, work)

    monkeypatch.setattr(GraphCache, "_record", disturbed)
    check_six_texts(engine, lambda: make_request([5, 6, 7], max_tokens=20))
    assert failures == [num_failures]
    assert bool(engine.runner.graphs.num_replays) == (num_failures < 3)


def test_a_request_that_is_aborted_while_a_step_is_pending_frees_its_pages(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    engine = make_engine(**OPTIONS)
    engine.runner.max_steps, engine.runner.max_pending_steps = 4, 2
    requests = [make_request([5, 6, 7], max_tokens=60) for _ in range(3)]
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert engine._pending
    assert engine.abort(requests[:1]) == requests[:1]
    assert not requests[0].block_table
    other = make_request([9, 9, 9], max_tokens=60)  # takes its pages and its row at once
    engine.add(other)
    run(engine)
    assert other.num_output_tokens == 60
    assert [r.num_output_tokens for r in requests[1:]] == [60, 60]
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks


def test_an_error_fails_the_requests_of_all_pending_steps(
    make_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(**OPTIONS)
    engine.runner.max_steps, engine.runner.max_pending_steps = 4, 2
    requests = [make_request([5, 6, 7], max_tokens=60) for _ in range(3)]
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()

    def broken(*_: Any) -> Any:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.decode_loop, "run", broken)
        engine.step()
    assert all(isinstance(request.error, RequestFailedError) for request in requests)
    assert not engine.has_requests
    again = make_request([5, 6, 7], max_tokens=8)
    engine.add(again)
    run(engine)
    assert again.finish_reason is FinishReason.LENGTH


def test_logits_that_go_bad_in_a_later_step_fail_the_row_alone(
    make_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(**OPTIONS)
    engine.runner.max_steps, engine.runner.max_pending_steps = 8, 2
    bad, good = make_request([5, 6, 7], max_tokens=30), make_request([8, 9], max_tokens=15)
    model: Any = engine.runner.model
    forward = model.forward

    def poisoned(input_ids: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden: torch.Tensor = forward(input_ids, positions, *rest)
        return torch.where((positions == 20)[:, None], torch.nan, hidden)

    monkeypatch.setattr(model, "forward", poisoned)
    for request in (bad, good):
        engine.add(request)
    run(engine)
    assert isinstance(bad.error, RequestFailedError) and "NaN" in str(bad.error)
    assert good.finish_reason is FinishReason.LENGTH
    assert good.num_output_tokens == 15


@pytest.fixture
def make_gpu_engine(make_checkpoint: Callable[..., Any]) -> Callable[..., Engine]:
    """The tiny Qwen 3 in float32 on a GPU, with CUDA graphs unless told otherwise."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def make(**options: Any) -> Engine:
        folder, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)
        options = {"device": "cuda", "dtype": "float32", "block_size": 8} | options
        engine = load_engine(folder, EngineConfig(**options)).engine
        engine.check_integrity = True
        return engine

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 16}], ids=["roomy", "tight"])
def test_captured_steps_give_the_tokens_of_eager_ones(
    make_gpu_engine: MakeEngine, make_request: MakeRequest, options: dict[str, Any]
) -> None:
    for seed in range(3):
        alone = make_gpu_engine(**OPTIONS, enforce_eager=True)
        jobs = make_jobs(seed, on_device=seed != 2)
        expected_requests = [make_request(prompt, **job) for prompt, job in jobs]
        for request in expected_requests:
            alone.add(request)
            run(alone)
        assert alone.runner.graphs.num_replays == 0
        engine = make_gpu_engine(**(OPTIONS | options))
        for _ in range(2):  # the second time everything is captured
            requests = [make_request(prompt, **job) for prompt, job in jobs]
            for request in requests:
                engine.add(request)
            before = engine.runner.graphs.num_replays
            run(engine)
            assert outcomes(requests) == outcomes(expected_requests)
            assert engine.runner.graphs.num_replays > before + 20
        assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks
        alone.release()
        engine.release()


@pytest.mark.gpu
@pytest.mark.parametrize("num_failures", [1, 2, 3])
def test_a_capture_during_which_the_device_is_synchronized_costs_no_token(
    make_gpu_engine: MakeEngine,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
    num_failures: int,
) -> None:
    engine = make_gpu_engine(**OPTIONS)
    record, failures = GraphCache._record, [0]

    def disturbed(graphs: GraphCache, work: Callable[[], None]) -> Any:
        def synchronize() -> None:
            work()
            torch.cuda.synchronize()

        if failures[0] == num_failures:
            return record(graphs, work)
        failures[0] += 1
        return record(graphs, synchronize)

    monkeypatch.setattr(GraphCache, "_record", disturbed)
    check_six_texts(engine, lambda: make_request([5, 6, 7], max_tokens=40))
    assert failures == [num_failures]
    assert bool(engine.runner.graphs.num_replays) == (num_failures < 3)
    engine.release()


@pytest.mark.gpu
def test_rows_that_begin_alike_are_decoded_with_a_shared_prefix(
    make_engine: MakeEngine,
    make_gpu_engine: MakeEngine,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(0)
    beginning = [rng.randrange(2, 500) for _ in range(204)]
    prompts = [beginning + [rng.randrange(2, 500) for _ in range(3)] for _ in range(60)]
    options = {"max_num_seqs": 60, "max_num_batched_tokens": 512, "max_model_len": 320}
    options |= {"block_size": 16}
    texts = []
    shared = set()
    fill = Cascade.fill

    def watched(cascade: Cascade, *arguments: Any) -> None:
        fill(cascade, *arguments)
        if cascade.is_filled:
            metadata = cascade.metadata
            shared.add("mixed" if len(metadata.seq_lens) > metadata.num_decode_seqs else "decode")

    monkeypatch.setattr(Cascade, "fill", watched)
    for make in (make_engine, make_gpu_engine):
        engine = make(**options)
        requests = [
            make_request(prompt, max_tokens=40 + i // 2) for i, prompt in enumerate(prompts)
        ]
        for half in (requests[::2], requests[1::2]):
            for request in half:
                engine.add(request)
            for _ in range(3):
                engine.step()
        run(engine)
        texts.append(outcomes(requests))
    assert texts[0] == texts[1]
    assert shared == {"decode", "mixed"}
    engine.release()
