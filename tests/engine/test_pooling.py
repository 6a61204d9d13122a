"""Prompts that are embedded share steps, rows and pages with texts that are generated."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nbllm import PoolingParams, RequestFailedError, SamplingParams
from nbllm.engine.engine import Engine
from nbllm.engine.request import FinishReason, Request

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]
# Few tokens a step, so that prompts are cut, and few pages, so that requests are preempted.
TIGHT: dict[str, Any] = {
    "max_num_seqs": 5,
    "max_num_batched_tokens": 12,
    "max_model_len": 96,
    "num_gpu_blocks_override": 14,
}
TOLERANCE = 1e-4


@pytest.fixture(params=["plain", "ahead"])
def engine_kind(request: pytest.FixtureRequest) -> MakeEngine:
    """Engines with one step at a time, and with captured steps ahead of their results."""
    fixture = "make_engine" if request.param == "plain" else "make_replaying_engine"
    return request.getfixturevalue(fixture)


@pytest.fixture
def hidden_states(make_checkpoint: Callable[..., Any]) -> Callable[[list[int]], torch.Tensor]:
    """What transformers computes for a prompt, [num_tokens, hidden_size]."""
    _, model = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)

    def compute(prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]

    return compute


def run(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def check_idle(engine: Engine) -> None:
    engine.scheduler.check_integrity()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_usable_blocks
    assert not engine.runner.batch.rows


def check_embedding(request: Request, hidden: Callable[[list[int]], torch.Tensor]) -> None:
    states = hidden(request.token_ids.tolist())
    assert request.pooling_params is not None
    expected = states.mean(0) if request.pooling_params.pooling == "mean" else states[-1]
    assert request.finish_reason is FinishReason.STOP
    assert request.num_output_tokens == 0
    assert request.embedding is not None and request.embedding.dtype == np.float32
    assert np.abs(request.embedding - expected.numpy()).max() < TOLERANCE


def make_batch(make_request: MakeRequest, rng: random.Random, count: int) -> list[Request]:
    requests = []
    for _ in range(count):
        prompt = [7] * rng.choice([0, 0, 16, 24])
        prompt += [rng.randrange(2, 500) for _ in range(rng.randrange(1, 40))]
        pooling = rng.choice(["last", "mean", None])
        if pooling is None:
            params = SamplingParams(
                temperature=rng.choice([0.0, 1.0]),
                ignore_eos=True,
                prompt_logprobs=rng.choice([None, None, 0]),
            )
            requests.append(make_request(prompt, rng.randrange(1, 30), params=params))
        else:
            pooling_params = PoolingParams(pooling=pooling)
            requests.append(make_request(prompt, 1, pooling_params=pooling_params))
    return requests


def solo_tokens(make_engine: MakeEngine, make_request: MakeRequest, request: Request) -> list[int]:
    engine = make_engine()
    prompt = request.token_ids[: request.num_prompt_tokens].tolist()
    alone = make_request(prompt, request.max_tokens, params=request.sampling_params)
    engine.add(alone)
    run(engine)
    return alone.output_token_ids


@pytest.mark.parametrize("caching", [True, False])
def test_cut_and_preempted_prompts_have_the_embeddings_of_transformers(
    engine_kind: MakeEngine,
    make_engine: MakeEngine,
    make_request: MakeRequest,
    hidden_states: Callable[[list[int]], torch.Tensor],
    caching: bool,
) -> None:
    engine = engine_kind(enable_prefix_caching=caching, **TIGHT)
    requests = make_batch(make_request, random.Random(0), 40)
    for request in requests:
        engine.add(request)
    run(engine)
    check_idle(engine)
    embedded = [request for request in requests if request.pooling_params is not None]
    for request in embedded:
        check_embedding(request, hidden_states)
    assert any(request.metrics.num_preemptions for request in embedded)
    assert any(request.num_prompt_tokens > 32 for request in embedded), "no prompt was cut"
    assert any(request.num_cached_tokens for request in embedded) == caching
    for request in requests:
        if request.pooling_params is None:
            tokens = solo_tokens(make_engine, make_request, request)
            assert request.output_token_ids == tokens
    generated = sum(request.num_output_tokens for request in requests)
    assert engine.num_generated_tokens == generated


@pytest.mark.parametrize("num_batches", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_aborts_in_the_middle_of_a_prompt_leave_nothing_behind(
    engine_kind: MakeEngine,
    make_request: MakeRequest,
    hidden_states: Callable[[list[int]], torch.Tensor],
    num_batches: int,
) -> None:
    engine = engine_kind(**TIGHT)
    rng = random.Random(1)
    for _ in range(num_batches):
        requests = make_batch(make_request, rng, 8)
        for request in requests:
            engine.add(request)
        for _ in range(rng.randrange(1, 6)):
            engine.step()
        begun = [r for r in requests if not r.is_finished and r.num_computed_tokens]
        victims = rng.sample(begun, min(len(begun), 2))
        assert engine.abort(victims) == victims
        run(engine)
        check_idle(engine)
        for request in victims:
            assert request.finish_reason is FinishReason.ABORT and request.embedding is None
        for request in set(requests) - set(victims):
            if request.pooling_params is not None:
                check_embedding(request, hidden_states)


def test_a_mean_computes_every_token_and_lets_others_use_its_pages(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    hidden_states: Callable[[list[int]], torch.Tensor],
) -> None:
    engine = make_engine()
    prompt = [random.Random(3).randrange(2, 500) for _ in range(37)]
    for pooling, num_cached in (("mean", 0), ("mean", 0), ("last", 32)):
        request = make_request(prompt, 1, pooling_params=PoolingParams(pooling=pooling))
        engine.add(request)
        run(engine)
        assert request.num_cached_tokens == num_cached
        check_embedding(request, hidden_states)
    text = make_request(prompt, 4)
    engine.add(text)
    run(engine)
    assert text.num_cached_tokens == 32


def test_hidden_states_that_are_not_numbers_fail_alone(
    engine_kind: MakeEngine,
    make_request: MakeRequest,
    hidden_states: Callable[[list[int]], torch.Tensor],
) -> None:
    engine = engine_kind()
    pool = engine.runner.pooler.pool

    def spoil(hidden: torch.Tensor, output: Any) -> Any:
        first = 0
        for item in output.scheduled:
            if 13 in item.request.token_ids:
                hidden[first : first + item.num_scheduled_tokens] = torch.inf
            first += item.num_scheduled_tokens
        return pool(hidden, output)

    engine.runner.pooler.pool = spoil  # type: ignore[method-assign]
    params = PoolingParams()
    bad, good = (make_request(ids, 1, pooling_params=params) for ids in ([13, 4], [5, 6, 7]))
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert isinstance(bad.error, RequestFailedError) and "not numbers" in str(bad.error)
    assert bad.embedding is None
    check_embedding(good, hidden_states)
    check_idle(engine)


def test_an_error_in_a_step_fails_the_embeddings_in_it_alone(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    hidden_states: Callable[[list[int]], torch.Tensor],
) -> None:
    engine = make_engine(**TIGHT)
    prompts = [[random.Random(i).randrange(2, 500) for _ in range(20)] for i in range(8)]
    params = PoolingParams(pooling="mean")
    requests = [make_request(prompt, 1, pooling_params=params) for prompt in prompts]
    for request in requests:
        engine.add(request)
    engine.step()
    pool, engine.runner.pooler.pool = engine.runner.pooler.pool, None  # type: ignore[method-assign]
    failed = engine.step()
    engine.runner.pooler.pool = pool  # type: ignore[method-assign]
    assert failed and all(isinstance(request.error, RequestFailedError) for request in failed)
    run(engine)
    check_idle(engine)
    fine = set(requests) - set(failed)
    assert len(fine) >= 4
    for request in fine:
        check_embedding(request, hidden_states)


def test_texts_run_captured_unless_a_prompt_beside_them_is_embedded(
    make_replaying_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_replaying_engine()
    eager: list[int] = []
    run_eagerly = engine.runner._run_eagerly

    def count(step: Any, output: Any, result: Any) -> Any:
        eager.append(len(output.scheduled))
        return run_eagerly(step, output, result)

    monkeypatch.setattr(engine.runner, "_run_eagerly", count)
    for request in (make_request([4, 5, 6]), make_request([8, 9])):
        engine.add(request)
    run(engine)
    assert not eager
    text = make_request([4, 5, 6], 12)
    engine.add(text)
    engine.step()
    vector = make_request([8, 9], 1, pooling_params=PoolingParams())
    engine.add(vector)
    run(engine)
    assert eager == [2]
    assert text.num_output_tokens == 12 and vector.embedding is not None
