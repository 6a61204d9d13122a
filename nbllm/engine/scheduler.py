"""Scheduler: which requests run in the next step, and for how many tokens.

There are no phases. Every step hands out tokens, running requests first, so that each request's
`num_computed_tokens` catches up with its `num_tokens`. A long prompt that gets fewer tokens than it
needs is chunked prefill; a prompt whose first pages were found in the cache starts further on; a
preempted request simply starts again from zero. (The rule is that of vLLM V1's scheduler.)

What is scheduled is booked at once, before it ran: the next step can be scheduled, and enqueued
behind it, while nothing is known of the tokens that it samples. All steps run on one stream in
their order, so a page may be found, shared, freed and given away as if every step before had ended:
whoever gets it reads and writes it in a later step. A token that ends a text unexpectedly leaves
the steps behind it with a sequence too many; its results are dropped.

Rows of a frame go after what somebody waits for: a cell, a client, a widget. They fill the places
that the others leave, and give them back.
"""

from __future__ import annotations

import heapq

from nbllm.config import EngineConfig
from nbllm.engine.block_manager import BlockManager
from nbllm.engine.request import FinishReason, Request, RequestStatus
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput

Order = tuple[int, bool, int]
"""Priority, whether it is a row of a frame (these two are the kind of a request), arrival."""


class Scheduler:
    """FCFS or priority order, chunked prefill, preemption by recompute.

    Args:
        config: a resolved EngineConfig (no field that it uses is None).
        block_manager: the pages.
    """

    def __init__(self, config: EngineConfig, block_manager: BlockManager) -> None:
        assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
        self.block_manager = block_manager
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.enable_chunked_prefill = config.enable_chunked_prefill
        self.uses_priority = config.scheduling_policy == "priority"
        self.requests: dict[str, Request] = {}  # all that are not finished, by id
        # In scheduling order: the last is preempted first.
        self.running: dict[Request, None] = {}
        self.ending: dict[Request, None] = {}  # enqueued steps complete them
        self.num_preemptions = 0
        self._released: list[Request] = []  # since the last schedule()
        self._waiting: list[tuple[Order, Request]] = []  # a heap
        self._num_waiting = 0
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return self._num_waiting

    @property
    def has_requests(self) -> bool:
        """True if a step would have something to do."""
        return bool(self.requests)

    def add(self, request: Request) -> None:
        """Take a new request."""
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        self.requests[request.request_id] = request
        self._push_waiting(request)

    def schedule(self, max_steps: int = 1, *, may_preempt: bool = True) -> SchedulerOutput:
        """Hand out the tokens of the next step and the pages they need, and book them.

        Args:
            max_steps: upper bound on `SchedulerOutput.num_steps`.
            may_preempt: False while enqueued steps have not ended: they may free the pages that
                are missing, and a request that is in them keeps its own.

        Returns:
            the step; without requests if there is nothing to do before others have ended.
        """
        budget = self.max_num_batched_tokens
        decodes: list[Request] = []
        prefills: list[ScheduledRequest] = []
        released, self._released = self._released, []
        if not self._make_way(released, may_preempt):
            self._released = released
            return SchedulerOutput((), 0, (), 1)
        num_preemptions = self.num_preemptions
        lacks_pages = False
        for request in list(self.running):
            if not budget or request not in self.running:
                break  # it was preempted, and so was all that came after it
            if request.num_output_placeholders and request.needs_known_tokens:
                continue
            lacks_pages = not self._make_room(request, released, may_preempt)
            if lacks_pages:
                break
            if request.is_decoding:
                decodes.append(request)
                budget -= 1
            else:
                prefills.append(self._book_tokens(request, budget))
                budget -= prefills[-1].num_scheduled_tokens
        if not lacks_pages and self.num_preemptions == num_preemptions:
            self._admit_waiting(budget, prefills)
        num_steps = self._reserve_steps(decodes, max_steps) if decodes and not prefills else 1
        scheduled = [self._book_steps(request, num_steps) for request in decodes] + prefills
        return SchedulerOutput(tuple(scheduled), len(decodes), tuple(released), num_steps)

    def advance(self, output: SchedulerOutput, sampled: dict[Request, list[int]]) -> None:
        """Append what a step sampled that succeeded.

        Args:
            output: what `schedule()` returned for the step.
            sampled: the new tokens of every request whose last token was computed, one for each
                of the steps up to the one that ended it.
        """
        for item in output.scheduled:
            request, num_sampled = item.request, item.num_sampled_tokens
            if request.is_finished or not num_sampled:
                continue  # it failed or was aborted while the step ran, or ended before it
            tokens = sampled.get(request, [])
            request.num_output_placeholders -= num_sampled
            try:
                request.extend(tokens)
            except Exception as error:  # a stop checker that fails concerns its request only
                self.finish(request, FinishReason.ERROR, error)
                continue
            if len(tokens) != num_sampled and not request.is_finished:
                raise RuntimeError(f"{len(tokens)} tokens for {request.request_id}, which goes on")
            self.block_manager.register_full_blocks(request)
            if request.is_finished:
                self._forget(request)
            elif request.restart_len is not None and request.num_tokens == request.restart_len:
                request.begin_restart()
                self._preempt(request, self._released)

    def finish(
        self, request: Request, reason: FinishReason, error: BaseException | None = None
    ) -> None:
        """End a request otherwise than by a token, and give back its pages. Idempotent."""
        if request.is_finished:
            return
        request.error = error
        request.finish(reason)
        self._forget(request)

    def restart(self) -> list[Request]:
        """After an exception in the middle of a change: drop all pages, start all requests again.

        Only the tokens of the requests are kept, nothing of the page accounting is.

        Returns:
            requests that the interrupted change had finished already.
        """
        known = sorted(self.requests.values(), key=lambda request: request.arrival_index)
        self.block_manager.reset()
        self.requests, self.running, self.ending = {}, {}, {}
        self._released, self._waiting, self._num_waiting = [], [], 0
        for request in known:
            request.num_computed_tokens = 0
            request.num_output_placeholders = 0
            request.block_table.clear()
            request.prefix_ids.clear()
            if not request.is_finished:
                request.status = RequestStatus.WAITING
                self.requests[request.request_id] = request
                self._push_waiting(request)
        return [request for request in known if request.is_finished]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page has exactly the owners that it should have."""
        owners = [*self.running, *self.ending]
        waiting = [r for r in self.requests.values() if r not in set(owners)]
        queued = [request for _, request in self._waiting if not request.is_finished]
        assert len(owners) == len(set(owners)) and set(owners) <= set(self.requests.values())
        assert set(queued) == set(waiting), "a request is lost"
        assert len(queued) == len(waiting) == self._num_waiting, "the queue's count is off"
        assert all(not request.block_table for request in waiting), "a waiting request owns pages"
        assert all(request.status is RequestStatus.RUNNING for request in owners)
        assert len(self.running) <= self.max_num_seqs, "too many requests run"
        for request in owners:
            held = len(request.block_table) * self.block_manager.block_size
            assert request.num_computed_tokens <= held, "computed tokens without a page"
            assert request.is_booked_out == (request in self.ending)
            assert request.is_decoding or not request.num_output_placeholders
        self.block_manager.check_integrity(owners)

    def _make_way(self, released: list[Request], may_preempt: bool) -> bool:
        """Preempt the last ones where others, of a kind that goes before theirs, lack a place.

        Returns:
            False if somebody must be preempted, and nobody may be now.
        """
        blocks = self.block_manager
        while self.running and self._waiting:
            kind = self._order(last := next(reversed(self.running)))[:2]
            if self._waiting[0][0][:2] >= kind:
                break
            firsts = [r for order, r in self._waiting if order[:2] < kind and not r.is_finished]
            num_pages = sum(blocks.num_blocks_for(request.num_tokens) for request in firsts)
            lacks_places = len(firsts) > self.max_num_seqs - self._num_rows
            if not lacks_places and num_pages <= blocks.num_free_blocks:
                break
            if not may_preempt:
                return False
            self._preempt(last, released)
        return True

    def _make_room(self, request: Request, released: list[Request], may_preempt: bool) -> bool:
        """Get pages for all tokens of a running request; preempt the last ones if need be.

        Returns:
            False if it has no room: it was the last one left to preempt, or nobody may be.
        """
        while not self.block_manager.grow(request, request.num_booked_tokens):
            if not may_preempt:
                return False
            victim = next(reversed(self.running))
            self._preempt(victim, released)
            if victim is request:
                return False
        return True

    def _reserve_steps(self, requests: list[Request], max_steps: int) -> int:
        """Take pages for several steps of requests that all decode, without preempting anybody.

        Returns:
            how many steps, at least one: for that they have pages already.
        """
        if max_steps == 1:
            return 1
        lens: list[tuple[Request, int, int]] = []  # tokens that it has, tokens that it may get
        for request in requests:
            if request.ends_on_host or request.reports_logprobs or request.shapes_logits:
                return 1
            num_tokens = request.num_booked_tokens
            lens.append((request, num_tokens, request.max_num_tokens - num_tokens))
        # If somebody waits: the first place that becomes free is his.
        remaining = [left for _, _, left in lens]
        size = self.block_manager.block_size
        num_steps = min(max_steps, min(remaining) if self._num_waiting else max(remaining))
        while num_steps > 1:
            # The last token that is sampled needs no page yet.
            wanted = [
                (request, num_tokens + min(num_steps, left) - 1)
                for request, num_tokens, left in lens
                if num_tokens + num_steps - 1 > len(request.block_table) * size
            ]
            if self.block_manager.can_grow(wanted):
                for request, num_tokens in wanted:
                    self.block_manager.grow(request, num_tokens)
                break
            num_steps //= 2
        return num_steps

    def _book_tokens(self, request: Request, budget: int) -> ScheduledRequest:
        """Compute tokens that are known, at most `budget`; sample after the last of all."""
        start = request.num_computed_tokens
        num_tokens = min(request.num_tokens - start, budget)
        samples = start + num_tokens == request.num_tokens
        item = self._book(
            ScheduledRequest(request, start, num_tokens, int(samples), request.shapes_logits)
        )
        self.block_manager.register_full_blocks(request)
        return item

    def _book_steps(self, request: Request, num_steps: int) -> ScheduledRequest:
        """Decode so many times, or as often as its length allows."""
        start = request.num_computed_tokens
        if num_steps > 1:
            num_steps = min(num_steps, request.max_num_tokens - request.num_booked_tokens)
        return self._book(ScheduledRequest(request, start, 1, num_steps, request.shapes_logits))

    def _book(self, item: ScheduledRequest) -> ScheduledRequest:
        request, _, num_scheduled, num_sampled, _ = item
        # After the first token that is sampled, each is computed in the step that samples the next.
        request.num_computed_tokens += num_scheduled + (num_sampled - 1 if num_sampled else 0)
        request.num_output_placeholders += num_sampled
        if num_sampled and request.is_booked_out:
            del self.running[request]
            self.ending[request] = None
            self._released.append(request)
        return item

    def _preempt(self, request: Request, released: list[Request]) -> None:
        del self.running[request]
        self.block_manager.free(request)
        request.preempt()
        self._push_waiting(request)
        self.num_preemptions += 1
        released.append(request)

    def _admit_waiting(self, budget: int, prefills: list[ScheduledRequest]) -> None:
        """Start waiting requests in order while tokens, places and pages last."""
        postponed: list[tuple[Order, Request]] = []
        is_sorted = True
        while self._waiting and budget > 0 and self._num_rows < self.max_num_seqs:
            entry = heapq.heappop(self._waiting)
            order, request = entry
            if request.status is not RequestStatus.WAITING:
                continue
            if request.leader is not None and not request.leader.has_computed_prompt:
                postponed.append(entry)
                continue
            if not self._fits(request, budget) or not self.block_manager.admit(request):
                postponed.append(entry)
                break
            self._num_waiting -= 1
            if not request.metrics.num_preemptions:
                computed, num_prompt = request.num_computed_tokens, request.num_prompt_tokens
                request.num_cached_tokens = min(computed, num_prompt)
            request.start_running()
            last = next(reversed(self.running), None)
            is_sorted = is_sorted and (last is None or self._order(last) < order)
            self.running[request] = None
            prefills.append(self._book_tokens(request, budget))
            budget -= prefills[-1].num_scheduled_tokens
        for entry in postponed:
            heapq.heappush(self._waiting, entry)
        if not is_sorted:
            self.running = dict.fromkeys(sorted(self.running, key=self._order))

    @property
    def _num_rows(self) -> int:
        """Requests in the tables of the device, those included that the step completes."""
        return len(self.running) + len(self._released)

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
            del self.running[request]
        elif request in self.ending:
            del self.ending[request]
        else:
            self._num_waiting -= 1  # its entry in the heap is skipped when it surfaces
        self.block_manager.free(request)

    def _push_waiting(self, request: Request) -> None:
        heapq.heappush(self._waiting, (self._order(request), request))
        self._num_waiting += 1

    def _order(self, request: Request) -> Order:
        priority = request.priority if self.uses_priority else 0
        return priority, request.source == "dataframe", request.arrival_index
