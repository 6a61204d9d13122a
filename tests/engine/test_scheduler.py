"""Scheduler: budgets hold, the oldest makes progress, everything ends."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nbllm import SamplingParams
from nbllm.config import EngineConfig
from nbllm.engine.block_manager import BlockManager
from nbllm.engine.request import FinishReason, Request
from nbllm.engine.scheduler import Scheduler
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput

MakeRequest = Callable[..., Request]


def make_scheduler(num_blocks: int = 64, block_size: int = 4, **options: object) -> Scheduler:
    defaults: dict[str, object] = {"max_num_seqs": 4, "max_num_batched_tokens": 16}
    config = EngineConfig(**(defaults | options))  # type: ignore[arg-type]
    return Scheduler(config, BlockManager(num_blocks, block_size, config.enable_prefix_caching))


def advance(scheduler: Scheduler, token: int = 7) -> SchedulerOutput:
    """One step in which every request that samples gets `token`."""
    output = scheduler.schedule()
    sampled = {i.request: [token] for i in output.scheduled if i.num_sampled_tokens}
    scheduler.advance(output, sampled)
    scheduler.check_integrity()
    return output


def shares(output: SchedulerOutput) -> list[int]:
    return [item.num_scheduled_tokens for item in output.scheduled]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes(make_request: MakeRequest) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request([1, 2]))
    assert shares(advance(scheduler)) == [2]
    scheduler.add(make_request(list(range(40))))
    outputs = [advance(scheduler) for _ in range(4)]
    assert [shares(output) for output in outputs] == [[1, 15], [1, 15], [1, 10], [1, 1]]
    assert [output.num_decodes for output in outputs] == [1, 1, 1, 2]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it(
    make_request: MakeRequest,
) -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False)
    scheduler.add(make_request(list(range(10))))
    scheduler.add(make_request(list(range(50, 60))))
    assert shares(advance(scheduler)) == [10]
    assert shares(advance(scheduler)) == [1, 10]


def test_requests_run_in_the_order_of_their_arrival(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    requests = [make_request([i], max_tokens=2) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    order = [advance(scheduler).scheduled[0].request for _ in range(6)]
    assert order == [r for r in requests for _ in range(2)]


def test_a_lower_priority_number_runs_first(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority")
    late, urgent = make_request([1], priority=5), make_request([2], priority=-1)
    scheduler.add(late)
    scheduler.add(urgent)
    assert advance(scheduler).scheduled[0].request is urgent


def test_rows_of_a_frame_make_way_for_what_somebody_waits_for(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    rows = [make_request([number], source="dataframe") for number in range(4)]
    for row in rows:
        scheduler.add(row)
    advance(scheduler)
    asked = make_request([9], max_tokens=2)
    scheduler.add(asked)
    output = advance(scheduler)
    assert [item.request for item in output.scheduled] == [rows[0], asked]
    assert output.released == (rows[1],)
    later = make_request([8], source="cell")
    scheduler.add(later)
    assert {item.request for item in advance(scheduler).scheduled} == {asked, later}
    while scheduler.has_requests:
        advance(scheduler)
    assert all(row.num_output_tokens == 8 for row in rows)


def test_rows_of_a_frame_give_their_pages_back_when_others_need_them(
    make_request: MakeRequest,
) -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=32, enable_prefix_caching=False)
    rows = [make_request([number] * 7, source="dataframe") for number in range(2)]
    for row in rows:
        scheduler.add(row)
    advance(scheduler)
    asked = make_request([9] * 10, max_tokens=1)
    scheduler.add(asked)
    output = advance(scheduler)
    assert asked in {item.request for item in output.scheduled}
    assert output.released[: len(rows)] == (rows[1],)


def test_nobody_makes_way_before_the_enqueued_steps_have_ended(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    row, asked = make_request([1], source="dataframe"), make_request([2])
    scheduler.add(row)
    advance(scheduler)
    scheduler.add(asked)
    assert not scheduler.schedule(may_preempt=False).scheduled
    assert [item.request for item in advance(scheduler).scheduled] == [asked]


def test_who_asks_alike_does_not_make_way(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for source in ("cell", "server"):
        scheduler.add(make_request([1], source=source))
    first, _ = advance(scheduler), advance(scheduler)
    assert scheduler.num_preemptions == 0 and first.scheduled[0].request.source == "cell"


def test_the_last_of_the_running_is_preempted_and_comes_back(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=32)  # 20 tokens
    first, second = make_request([1] * 8, max_tokens=9), make_request([2] * 8, max_tokens=9)
    scheduler.add(first)
    scheduler.add(second)
    preempted = []
    while scheduler.has_requests:
        preempted += [r for r in advance(scheduler).released if not r.is_finished]
    assert preempted == [second]
    assert first.num_output_tokens == second.num_output_tokens == 9
    assert second.metrics.num_preemptions == scheduler.num_preemptions == 1


def test_followers_wait_for_their_leaders_prompt_and_share_its_pages(
    make_request: MakeRequest,
) -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    leader = make_request([1] * 9, cache_salt=3)
    follower = make_request([1] * 9, cache_salt=3, leader=leader)
    scheduler.add(leader)
    scheduler.add(follower)
    assert shares(advance(scheduler)) == [9, 1]
    assert shares(advance(scheduler)) == [1, 1]
    assert follower.block_table[:2] == leader.block_table[:2]


def test_a_page_is_not_found_whose_last_token_ended_the_text(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(block_size=4)
    params = SamplingParams(stop_token_ids=[9])
    request = make_request([1, 2, 3], params=params)
    scheduler.add(request)
    first, ahead = scheduler.schedule(), scheduler.schedule()
    assert ahead.scheduled[0].start == 3  # where the 9 goes, if the device went on after it
    scheduler.advance(first, {request: [9]})
    assert request.is_finished
    follower = make_request([1, 2, 3, 9, 5])
    assert scheduler.block_manager.find_cached_blocks(follower) == []


def test_a_stop_checker_that_raises_ends_its_own_request_only(make_request: MakeRequest) -> None:
    def broken(_: list[int]) -> str | None:
        raise ValueError("no such text")

    scheduler = make_scheduler()
    bad, good = make_request([1], stop_checker=broken), make_request([2], max_tokens=2)
    scheduler.add(bad)
    scheduler.add(good)
    advance(scheduler)
    advance(scheduler)
    assert bad.finish_reason is FinishReason.ERROR
    assert isinstance(bad.error, ValueError)
    assert good.finish_reason is FinishReason.LENGTH


def test_a_restart_keeps_tokens_and_order_and_nothing_else(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [make_request([i] * 5, max_tokens=4) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    advance(scheduler)
    assert scheduler.restart() == []
    scheduler.check_integrity()
    assert scheduler.num_waiting == 3 and not scheduler.running
    assert [r.num_output_tokens for r in requests] == [1, 1, 0]
    while scheduler.has_requests:
        advance(scheduler)
    assert [r.num_output_tokens for r in requests] == [4, 4, 4]


class Device:
    """What the scheduler is told of never, and relies on: pages with content, steps in order.

    In the place of keys and values stands the whole text up to the token that they belong to.
    """

    def __init__(self, block_size: int, rng: random.Random) -> None:
        self.block_size = block_size
        self.rng = rng
        self.pages: dict[tuple[int, int], tuple[int, ...]] = {}
        self.texts: dict[Request, list[int]] = {}
        self.ended: set[Request] = set()

    def run(self, output: SchedulerOutput) -> dict[Request, list[int]]:
        """Run a step; returns its tokens, which the scheduler may hear of much later."""
        for request in output.released:
            self.texts.pop(request, None)
        for item in output.scheduled:
            if item.request not in self.texts:
                self.texts[item.request] = list(item.request.token_ids)
                self.ended.discard(item.request)
        sampled: dict[Request, list[int]] = {i.request: [] for i in output.scheduled}
        for number in range(output.num_steps):
            alive = [i for i in output.scheduled if i.request not in self.ended]
            for item in alive:
                text = self.texts[item.request]
                first = item.start + number
                for position in range(first, first + item.num_scheduled_tokens):
                    self.pages[self._slot(item.request, position)] = tuple(text[: position + 1])
            for item in alive:
                self._attend(item, number, sampled[item.request])
        return sampled

    def _attend(self, item: ScheduledRequest, number: int, sampled: list[int]) -> None:
        request, text = item.request, self.texts[item.request]
        end = item.first_position + number
        for position in range(end):
            page = self.pages[self._slot(request, position)]
            assert page == tuple(text[: position + 1]), "somebody else's page"
        if not item.num_sampled_tokens:
            return
        assert end == len(text), "it samples before its last token is computed"
        text.append(self.rng.randrange(3))
        sampled.append(text[-1])
        if text[-1] in request.stop_ids or len(text) == request.max_num_tokens:
            self.ended.add(request)

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_table[position // self.block_size], position % self.block_size


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, int]:
    return {
        "prompt_len": draw(st.integers(1, 20)),
        "max_tokens": draw(st.integers(1, 8)),
        "kind": draw(st.integers(0, 2)),  # prompts of one kind share their prefix
        "arrival": draw(st.integers(0, 6)),
        "abort": draw(st.integers(0, 40)),  # aborted in that step if it is still there
        "priority": draw(st.integers(0, 2)),
        "source": draw(st.sampled_from(["cell", "dataframe"])),
        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "end": draw(st.sampled_from(["length", "stop id", "stop string", "bad word"])),
    }


def make_requests(number: int, job: dict[str, Any]) -> list[Request]:
    """`n` continuations of a prompt; the first leads the others."""
    prompt = [job["kind"]] * job["prompt_len"]
    options: dict[str, Any] = {"priority": job["priority"], "source": job["source"]}
    if job["end"] == "stop string":
        options["stop_checker"] = lambda ids: "1" if 1 in ids else None
    if job["end"] == "bad word":
        options["bad_words_token_ids"] = [[0, 1]]
    stop_ids = [2] if job["end"] == "stop id" else None
    params = SamplingParams(ignore_eos=True, stop_token_ids=stop_ids)
    requests: list[Request] = []
    token_ids = array("I", prompt)
    for k in range(job["n"]):
        if job["n"] > 1:
            options |= {"cache_salt": number + 1, "leader": requests[0] if requests else None}
        request = Request(
            f"{number}-{k}", token_ids[:], len(prompt), params, job["max_tokens"], k, **options
        )
        requests.append(request)
    return requests


@given(
    jobs=st.lists(jobs(), min_size=1, max_size=8),
    num_blocks=st.integers(8, 24),
    max_num_seqs=st.integers(1, 5),
    extra_tokens=st.integers(0, 20),
    policy=st.sampled_from(["fcfs", "priority"]),
    prefix_caching=st.booleans(),
    chunked=st.booleans(),
    max_steps=st.integers(1, 4),
    max_pending=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_workload_keeps_the_invariants_and_ends(
    jobs: list[dict[str, Any]],
    num_blocks: int,
    max_num_seqs: int,
    extra_tokens: int,
    policy: str,
    prefix_caching: bool,
    chunked: bool,
    max_steps: int,
    max_pending: int,
    seed: int,
) -> None:
    budget = max_num_seqs + extra_tokens
    scheduler = make_scheduler(
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        scheduling_policy=policy,
        enable_prefix_caching=prefix_caching,
        enable_chunked_prefill=chunked,
    )
    device = Device(scheduler.block_manager.block_size, random.Random(seed))
    pending: deque[tuple[SchedulerOutput, dict[Request, list[int]]]] = deque()
    arrivals: dict[int, list[Request]] = {}
    aborts: dict[int, list[Request]] = {}
    everything: list[Request] = []
    for number, job in enumerate(jobs):
        requests = make_requests(number, job)
        arrivals.setdefault(job["arrival"], []).extend(requests)
        aborts.setdefault(job["abort"], []).extend(requests)
        everything += requests
    for step in range(2000):
        for request in arrivals.pop(step, []):
            scheduler.add(request)
        for request in aborts.pop(step, []):
            if request.request_id in scheduler.requests:
                scheduler.finish(request, FinishReason.ABORT)
        before = {r: r.num_computed_tokens for r in everything}
        head = next(iter(scheduler.running), None)
        output = scheduler.schedule(max_steps, may_preempt=not pending)
        scheduler.check_integrity()
        assert output.num_tokens <= budget
        assert len({i.request for i in output.scheduled}) == len(output.scheduled) <= max_num_seqs
        assert output.num_steps == 1 or output.only_decodes
        assert all(i.num_scheduled_tokens == 1 for i in output.scheduled[: output.num_decodes])
        for item in output.scheduled:
            if item.request.needs_known_tokens:
                assert item.first_position <= item.request.num_tokens, "a token is not known yet"
        if scheduler.has_requests:
            assert output.scheduled or output.released or pending, "nothing happens"
        if head is not None and head.source == "cell" and policy == "fcfs" and not pending:
            assert head.is_finished or head.num_computed_tokens > before[head]
        sampled = device.run(output)
        if output.scheduled:
            pending.append((output, sampled))
        if pending and (len(pending) == max_pending or not output.scheduled):
            scheduler.advance(*pending.popleft())
            scheduler.check_integrity()
        if not scheduler.has_requests and not arrivals:
            break
    assert all(request.is_finished for request in everything)
    manager = scheduler.block_manager
    assert manager.num_free_blocks == manager.num_usable_blocks
