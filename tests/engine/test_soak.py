"""A long life: many requests, aborts, disconnects and preemptions, and nothing is lost."""

from __future__ import annotations

import gc
import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbllm import SamplingParams
from nbllm.engine.engine import Engine
from nbllm.engine.request import FinishReason, Request

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]

NUM_PROMPTS = 200
PREEMPT_EVERY = 25  # steps


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


class Soak:
    """Requests over a fixed set of prompts, whose solo texts are known."""

    def __init__(self, engine: Engine, make_request: MakeRequest, seed: int = 0) -> None:
        self.engine = engine
        self.make_request = make_request
        self.rng = random.Random(seed)
        self.jobs = [self._make_job() for _ in range(NUM_PROMPTS)]
        self.expected = [self._run_alone(job) for job in range(NUM_PROMPTS)]
        self.resident: list[int] = []
        self.num_survivors = 0

    def _make_job(self) -> tuple[list[int], int, SamplingParams]:
        rng = self.rng
        shared = [7] * rng.choice([0, 0, 16, 24])
        prompt = shared + [rng.randrange(2, 500) for _ in range(rng.randrange(1, 24))]
        greedy = rng.random() < 0.5
        params = SamplingParams(temperature=0.0 if greedy else 1.0, ignore_eos=True)
        return prompt, rng.randrange(4, 17), params

    def _make(self, job: int) -> Request:
        prompt, max_tokens, params = self.jobs[job]
        return self.make_request(prompt, max_tokens, params=params, seed=job)

    def _run_alone(self, job: int) -> list[int]:
        request = self._make(job)
        self.engine.add(request)
        while self.engine.has_requests:
            self.engine.step()
        return request.output_token_ids

    def run(self, num_requests: int) -> None:
        engine, rng = self.engine, self.rng
        active: dict[Request, int] = {}  # -> job
        doomed: dict[int, list[Request]] = {}  # step -> requests that end there from outside
        added = 0
        while added < num_requests or active:
            while added < num_requests and len(active) < 24:
                job = rng.randrange(NUM_PROMPTS)
                request = self._make(job)
                engine.add(request)
                active[request] = job
                added += 1
                if rng.random() < 0.3:  # 20% aborts and 10% disconnects take the same way here
                    doomed.setdefault(engine.num_steps + rng.randrange(30), []).append(request)
                if added % 1000 == 0:
                    gc.collect()
                    self.resident.append(resident_bytes())
            for step in [step for step in doomed if step <= engine.num_steps]:
                for request in engine.abort(doomed.pop(step)):
                    del active[request]
            if engine.num_steps % PREEMPT_EVERY == 0 and engine.runner.max_pending_steps == 1:
                self._preempt()
            if not engine.has_requests:
                continue
            for request in engine.step():
                if request.is_finished:
                    assert request.finish_reason is FinishReason.LENGTH
                    assert request.output_token_ids == self.expected[active.pop(request)]
                    self.num_survivors += 1

    def _preempt(self) -> None:
        """What the scheduler does when pages run out, to the last of the running."""
        scheduler = self.engine.scheduler
        preempted: list[Request] = []
        if scheduler.running:
            scheduler._preempt(next(reversed(scheduler.running)), preempted)
        for request in preempted:
            self.engine.runner.batch.remove(request)

    def check_idle(self) -> None:
        scheduler, blocks = self.engine.scheduler, self.engine.block_manager
        assert not scheduler.requests and not scheduler.running and scheduler.num_waiting == 0
        assert blocks.num_free_blocks == blocks.num_usable_blocks
        assert not self.engine.runner.batch.rows
        blocks.check_integrity([])


def make_soak(make_engine: MakeEngine, make_request: MakeRequest, num_blocks: int = 64) -> Soak:
    engine = make_engine(
        max_num_seqs=16,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=num_blocks,
        max_model_len=64,
    )
    return Soak(engine, make_request)


def test_a_thousand_requests_with_aborts_and_preemptions_lose_no_page(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    soak = make_soak(make_engine, make_request)
    soak.run(1_000)
    soak.check_idle()
    assert soak.num_survivors > 600
    assert soak.engine.scheduler.num_preemptions > 20


def test_steps_that_are_enqueued_before_the_last_has_ended_lose_no_page(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    soak = make_soak(make_engine, make_request, num_blocks=24)  # pages run out by themselves
    soak.engine.runner.max_steps, soak.engine.runner.max_pending_steps = 2, 2
    soak.run(500)
    soak.check_idle()
    assert soak.num_survivors > 300
    assert soak.engine.scheduler.num_preemptions > 20


@pytest.mark.slow
def test_a_hundred_thousand_requests_lose_no_page_and_no_memory(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    soak = make_soak(make_engine, make_request)
    threads = threading.active_count()
    soak.run(100_000)
    soak.check_idle()
    assert soak.num_survivors > 60_000
    assert soak.engine.num_generated_tokens > 800_000
    assert threading.active_count() == threads
    warm = soak.resident[20:]  # thousands of requests
    slope = (warm[-1] - warm[0]) / (len(warm) - 1) * 10
    assert slope < 1e6, f"{slope / 1e6:.2f} MB per 10,000 requests"
