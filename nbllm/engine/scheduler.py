"""Scheduler: which requests run in the next step, and for how many tokens.

There are no phases. Every step hands out tokens, running requests first, so that each request's
`num_computed_tokens` catches up with its `num_tokens`. A long prompt that gets fewer tokens than it
needs is chunked prefill; a prompt whose first pages were found in the cache starts further on; a
preempted request simply starts again from zero. (The rule is that of vLLM V1's scheduler.)
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from nbllm.config import EngineConfig
from nbllm.engine.block_manager import BlockManager
from nbllm.engine.request import FinishReason, Request, RequestStatus


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step."""

    request: Request
    num_scheduled_tokens: int

    @property
    def samples(self) -> bool:
        """True if the step computes the request's last token, so that a new one is sampled."""
        request = self.request
        return request.num_computed_tokens + self.num_scheduled_tokens == request.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step computes.

    Attributes:
        scheduled: requests that decode (one token each, input sampled by an earlier step) come
            first, the others after them.
        num_decodes: how many of `scheduled` decode.
        preempted: requests that lost their pages to the others.
        num_steps: the step is run so many times in a row, each time on the tokens that the last
            one sampled; more than one only if all requests decode.
        num_unknown_tokens: tokens of each request that the step before samples, which the host
            has not heard of yet.
    """

    scheduled: tuple[ScheduledRequest, ...]
    num_decodes: int
    preempted: tuple[Request, ...]
    num_steps: int = 1
    num_unknown_tokens: int = 0

    @property
    def only_decodes(self) -> bool:
        """True if every request of the step decodes."""
        return self.num_decodes == len(self.scheduled)


class Scheduler:
    """FCFS or priority order, chunked prefill, preemption by recompute.

    Args:
        config: a resolved EngineConfig (no field that it uses is None).
        block_manager: the pages.
    """

    def __init__(self, config: EngineConfig, block_manager: BlockManager) -> None:
        assert config.max_num_seqs is not None
        assert config.max_num_batched_tokens is not None
        self.block_manager = block_manager
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.enable_chunked_prefill = config.enable_chunked_prefill
        self.uses_priority = config.scheduling_policy == "priority"
        self.requests: dict[str, Request] = {}  # all that are not finished, by id
        self.running: list[Request] = []  # in scheduling order: the last is preempted first
        self.num_preemptions = 0
        self._restarted: list[Request] = []  # lost their pages since the last schedule()
        self._waiting: list[tuple[int, int, Request]] = []  # a heap: (priority, arrival, request)
        self._num_waiting = 0
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return self._num_waiting

    @property
    def has_requests(self) -> bool:
        """True if a step would have something to do."""
        return bool(self.running) or self._num_waiting > 0

    def add(self, request: Request) -> None:
        """Take a new request."""
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        self.requests[request.request_id] = request
        self._push_waiting(request)

    def schedule(self, max_steps: int = 1) -> SchedulerOutput:
        """Hand out the tokens of the next step and the pages they need.

        Args:
            max_steps: upper bound on `SchedulerOutput.num_steps`.
        """
        budget = self.max_num_batched_tokens
        decodes: list[ScheduledRequest] = []
        prefills: list[ScheduledRequest] = []
        preempted: list[Request] = []
        restarted, self._restarted = self._restarted, []
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            if not self._make_room(request, preempted):
                break  # it was the last one left to preempt: itself
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            group = decodes if request.is_decoding else prefills
            group.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
            index += 1
        if not preempted:
            self._admit_waiting(budget, prefills)
        lost = (*restarted, *preempted)
        num_steps = 1
        if not prefills and decodes:
            num_steps = self._reserve_steps([item.request for item in decodes], 0, max_steps)
        return SchedulerOutput(tuple(decodes + prefills), len(decodes), lost, max(num_steps, 1))

    def schedule_ahead(self, output: SchedulerOutput, max_steps: int) -> SchedulerOutput | None:
        """What follows `output`, before anything is known of the tokens that it samples; all that
        was scheduled before it is booked.

        Requests that a token ends in the meantime are in it: the device passes them over.

        Returns:
            None if what follows depends on those tokens, or if somebody waits for a place that
            may become free, or for pages.
        """
        if len(output.scheduled) != len(self.running):
            return None
        num_unknown = output.num_steps
        going_on = [
            item
            for item in output.scheduled
            if item.request.num_tokens + num_unknown < item.request.max_num_tokens
        ]
        if not going_on or (self._num_waiting and len(going_on) < self.max_num_seqs):
            return None
        if any(i.request.needs_every_token or i.request.shapes_logits for i in going_on):
            return None
        if not all(item.samples for item in output.scheduled):
            return None
        requests = [item.request for item in going_on]
        num_steps = self._reserve_steps(requests, num_unknown, max_steps)
        if num_steps == 0:
            return None
        scheduled = tuple(ScheduledRequest(request, 1) for request in requests)
        return SchedulerOutput(scheduled, len(scheduled), (), num_steps, num_unknown)

    def advance(self, output: SchedulerOutput, sampled: dict[Request, list[int]]) -> None:
        """Book the tokens of a step that succeeded; append what was sampled.

        Args:
            output: what `schedule()` returned for the step.
            sampled: the new tokens of every request whose last token was computed, one for each
                of the steps up to the one that ended it.
        """
        for item in output.scheduled:
            request = item.request
            if request.is_finished:
                continue  # it failed alone while the step ran, or an earlier step ended it
            request.num_computed_tokens += item.num_scheduled_tokens
            for number, token in enumerate(sampled.get(request, ())):
                if number:
                    request.num_computed_tokens += 1  # of the token before this one
                try:
                    request.append(token)
                except Exception as error:  # a stop checker that fails concerns its request only
                    self.finish(request, FinishReason.ERROR, error)
                if request.is_finished:
                    break
            if request.block_table:
                self.block_manager.register_full_blocks(request)
            if request.is_finished:
                self._forget(request)
            elif request.num_tokens == request.restart_len:
                request.begin_restart()
                self._preempt(request, self._restarted)

    def finish(
        self, request: Request, reason: FinishReason, error: BaseException | None = None
    ) -> None:
        """End a request from outside (abort or error) and give back its pages. Idempotent."""
        if request.is_finished:
            return
        request.error = error
        request.finish(reason)
        self._forget(request)

    def restart(self) -> list[Request]:
        """After an exception in the middle of a change: drop all pages, start all requests again.

        The tokens of the requests are the only truth that is kept; nothing of the page accounting
        is.

        Returns:
            requests that the interrupted change had finished already.
        """
        known = sorted(self.requests.values(), key=lambda request: request.arrival_index)
        self.block_manager.reset()
        self.requests = {}
        self.running = []
        self._waiting = []
        self._num_waiting = 0
        for request in known:
            request.num_computed_tokens = 0
            request.block_table.clear()
            request.prefix_ids.clear()
            if not request.is_finished:
                request.status = RequestStatus.WAITING
                self.requests[request.request_id] = request
                self._push_waiting(request)
        return [request for request in known if request.is_finished]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page has exactly the owners that it should have."""
        running = {request.request_id for request in self.running}
        waiting = [r for r in self.requests.values() if r.request_id not in running]
        queued = [entry[2] for entry in self._waiting if not entry[2].is_finished]
        assert len(running) == len(self.running) and running <= set(self.requests)
        assert set(queued) == set(waiting), "a request is lost"
        assert len(queued) == len(waiting) == self._num_waiting, "the queue's count is off"
        assert all(not request.block_table for request in waiting), "a waiting request owns pages"
        assert all(request.status is RequestStatus.RUNNING for request in self.running)
        assert len(self.running) <= self.max_num_seqs, "too many requests run"
        for request in self.running:
            held = len(request.block_table) * self.block_manager.block_size
            assert request.num_computed_tokens <= held, "computed tokens without a page"
        self.block_manager.check_integrity(self.running)

    def _make_room(self, request: Request, preempted: list[Request]) -> bool:
        """Get pages for all tokens of a running request; preempt the last ones if need be."""
        while not self.block_manager.grow(request, request.num_tokens):
            victim = self.running[-1]
            self._preempt(victim, preempted)
            if victim is request:
                return False
        return True

    def _reserve_steps(self, requests: list[Request], num_unknown: int, max_steps: int) -> int:
        """Take pages for several steps of requests that all decode, without preempting anybody.

        Args:
            num_unknown: tokens that each of them has beyond those that the host knows.
            max_steps: upper bound.

        Returns:
            how many steps; 0 if there are no pages even for one.
        """
        num_steps = max_steps
        if any(request.needs_every_token or request.shapes_logits for request in requests):
            num_steps = 1
        if self._num_waiting:  # the first place that becomes free is somebody's
            num_steps = min(
                num_steps,
                *(r.max_num_tokens - r.num_tokens - num_unknown for r in requests),
            )
        while num_steps:
            # The last token that is sampled needs no page yet.
            wanted = [
                min(r.num_tokens + num_unknown + num_steps, r.max_num_tokens) - 1 for r in requests
            ]
            if self.block_manager.can_grow(zip(requests, wanted, strict=True)):
                for request, num_tokens in zip(requests, wanted, strict=True):
                    self.block_manager.grow(request, num_tokens)
                break
            num_steps //= 2
        return num_steps

    def _preempt(self, request: Request, preempted: list[Request]) -> None:
        self.running.remove(request)
        self.block_manager.free(request)
        request.preempt()
        self._push_waiting(request)
        self.num_preemptions += 1
        preempted.append(request)

    def _admit_waiting(self, budget: int, prefills: list[ScheduledRequest]) -> None:
        """Start waiting requests in order while tokens, places and pages last."""
        postponed: list[tuple[int, int, Request]] = []
        while self._waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            entry = heapq.heappop(self._waiting)
            request = entry[2]
            if request.status is not RequestStatus.WAITING:
                continue
            if request.leader is not None and not request.leader.has_computed_prompt:
                postponed.append(entry)
                continue
            if not self._fits(request, budget) or not self.block_manager.admit(request):
                postponed.append(entry)
                break
            self._num_waiting -= 1
            if request.metrics.num_preemptions == 0:
                request.num_cached_tokens = request.num_computed_tokens
            request.start_running()
            self.running.append(request)
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            prefills.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
        for entry in postponed:
            heapq.heappush(self._waiting, entry)
        self.running.sort(key=self._order)

    def _fits(self, request: Request, budget: int) -> bool:
        """Without chunked prefill a prompt must fit into what is left of the step as a whole.

        A prompt longer than a whole step is chunked all the same: it could never run otherwise.
        """
        if self.enable_chunked_prefill or budget == self.max_num_batched_tokens:
            return True
        num_cached = len(self.block_manager.find_cached_blocks(request))
        return request.num_tokens - num_cached * self.block_manager.block_size <= budget

    def _forget(self, request: Request) -> None:
        """Drop a request that has just finished from all lists, and free its pages."""
        if self.requests.pop(request.request_id, None) is None:
            return
        if request in self.running:
            self.running.remove(request)
        else:
            self._num_waiting -= 1  # its entry in the heap is skipped when it surfaces
        self.block_manager.free(request)

    def _push_waiting(self, request: Request) -> None:
        heapq.heappush(self._waiting, (*self._order(request), request))
        self._num_waiting += 1

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.uses_priority else 0, request.arrival_index)
