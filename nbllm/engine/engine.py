"""Engine: scheduler, block manager and model runner put together; one `step()` at a time.

It knows token ids only, runs in whatever thread calls it, and is not thread-safe: `EngineThread`
is its one caller.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch

from nbllm.config import EngineConfig
from nbllm.engine.block_manager import BlockManager
from nbllm.engine.pending_step import PendingStep, StepOutput
from nbllm.engine.request import FinishReason, Request, RequestStatus
from nbllm.engine.runner import Runner
from nbllm.engine.scheduler import Scheduler
from nbllm.engine.scheduler_output import SchedulerOutput
from nbllm.errors import EngineDeadError, RequestFailedError
from nbllm.histogram import Histogram
from nbllm.outputs import EngineSnapshot, RequestSnapshot

logger = logging.getLogger(__name__)

_STEP_TOKENS = (1, *(2**power for power in range(3, 17)))  # vLLM's ranges, and two more


class Engine:
    """Continuous batching over one model.

    Args:
        runner: runs the steps.
        config: the resolved configuration.
        check_integrity: verify the page accounting after every step (for tests; slow).

    Attributes:
        num_steps: steps run so far.
    """

    def __init__(
        self, runner: Runner[Any], config: EngineConfig, *, check_integrity: bool = False
    ) -> None:
        assert config.num_gpu_blocks_override is not None
        assert config.block_size is not None
        self.runner = runner
        self.config = config
        self.block_manager = BlockManager(
            config.num_gpu_blocks_override, config.block_size, config.enable_prefix_caching
        )
        self.scheduler = Scheduler(config, self.block_manager)
        self.check_integrity = check_integrity
        self._pending: deque[PendingStep] = deque()
        self._step_s = 0.0  # of the last decoding step
        self._last_result = 0.0  # when it arrived
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.finished_counts = dict.fromkeys(FinishReason, 0)

    @property
    def has_requests(self) -> bool:
        """True if a step would have something to do."""
        return self.scheduler.has_requests or bool(self._pending)

    def add(self, request: Request) -> None:
        """Take a new request."""
        self.scheduler.add(request)

    def abort(self, requests: Iterable[Request]) -> list[Request]:
        """End requests that are not finished; returns those that this call ended.

        Enqueued steps may go on writing their pages: see `nbllm.engine.scheduler`.
        """
        ended = [request for request in requests if not request.is_finished]
        for request in ended:
            self.scheduler.finish(request, FinishReason.ABORT)
            self._retire(request)
        return ended

    def step(self) -> list[Request]:
        """Enqueue steps as far ahead as the runner takes them, and take the result of the first.

        Returns:
            the requests that changed: got a token, finished or failed.

        Raises:
            EngineDeadError: the device can't go on in this process; every request has failed.
        """
        outputs = [pending.output for pending in self._pending]
        try:
            while len(self._pending) < self.runner.max_pending_steps:
                output = self.scheduler.schedule(self._max_steps, may_preempt=not self._pending)
                outputs.append(output)
                for request in output.released:
                    self.runner.batch.remove(request)
                if not output.scheduled:
                    break
                self._pending.append(self.runner.launch(output))
            if not self._pending:
                return []
            pending = self._pending.popleft()
            result = pending.result()
            self._observe(pending)
            changed = self._apply(pending.output, result)
        except BaseException as error:  # whatever it is, the other requests go on
            return self._recover(outputs, error)
        if self.check_integrity:
            self.scheduler.check_integrity()
        return changed

    def fail_all(self, error: BaseException) -> list[Request]:
        """End every request with `error`; returns them."""
        self._pending.clear()
        requests = list(self.scheduler.requests.values())
        for request in requests:
            self.scheduler.finish(request, FinishReason.ERROR, error)
            self._retire(request)
        return requests

    def release(self) -> None:
        """Free weights and KV cache. The engine can't be used afterwards."""
        self._pending.clear()
        self.runner.release()

    def metrics(self) -> dict[str, float | int]:
        """Counters and gauges, named as in vLLM's /metrics (without the prefix)."""
        blocks = self.block_manager
        used = blocks.num_usable_blocks - blocks.num_free_blocks
        return {
            "num_requests_running": len(self.scheduler.running) + len(self.scheduler.ending),
            "num_requests_waiting": self.scheduler.num_waiting,
            "kv_cache_usage_perc": used / blocks.num_usable_blocks,
            "num_preemptions": self.scheduler.num_preemptions,
            "prefix_cache_queries": blocks.num_prefix_queries,
            "prefix_cache_hits": blocks.num_prefix_hits,
            "num_requests_waiting_by_reason_capacity": self.scheduler.num_waiting,
            "prompt_tokens": self.num_prompt_tokens + blocks.num_prefix_hits,
            "prompt_tokens_cached": blocks.num_prefix_hits,
            "prompt_tokens_by_source_local_compute": self.num_prompt_tokens,
            "prompt_tokens_by_source_local_cache_hit": blocks.num_prefix_hits,
            "generation_tokens": self.num_generated_tokens,
            "num_steps": self.num_steps,
            **self.step_tokens.flat("iteration_tokens_total"),
            **{
                f"request_success_{reason.value}": count
                for reason, count in self.finished_counts.items()
            },
        }

    def snapshot(self, max_requests: int | None = None) -> EngineSnapshot:
        """What is in the engine now; lists at most `max_requests`, those that run first."""
        scheduler, blocks = self.scheduler, self.block_manager
        now = time.monotonic()
        running = chain(scheduler.running, scheduler.ending)
        waiting = (r for r in scheduler.requests.values() if r.status is RequestStatus.WAITING)
        listed = islice(chain(running, waiting), max_requests)
        return EngineSnapshot(
            metrics=self.metrics(),
            requests=tuple(_snapshot(request, now) for request in listed),
            num_by_source=dict(Counter(r.source for r in scheduler.requests.values())),
            block_size=blocks.block_size,
            num_blocks=blocks.num_usable_blocks,
            num_used_blocks=blocks.num_usable_blocks - blocks.num_free_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
        )

    @property
    def _max_steps(self) -> int:
        """Steps in a row, as many as take no longer than they should."""
        max_steps, max_launch_s = self.runner.max_steps, self.runner.max_launch_s
        if max_launch_s is None or not self._step_s:
            return max_steps
        return max(min(max_steps, int(max_launch_s / self._step_s)), 1)

    def _observe(self, pending: PendingStep) -> None:
        """See how long a step takes in which all decode."""
        now = time.monotonic()
        if pending.output.only_decodes:
            begin = max(pending.launched, self._last_result)  # it ran behind the one before
            self._step_s = (now - begin) / pending.output.num_steps
        self._last_result = now

    def _apply(self, output: SchedulerOutput, result: StepOutput) -> list[Request]:
        """Book a step that succeeded."""
        self.num_steps += output.num_steps
        for request in [item.request for item in output.scheduled if item.request.is_finished]:
            result.forget(request)  # it ended in the steps before, or was aborted
        for request, error in result.failed.items():
            self.runner.zero_blocks(self.block_manager.forget_content(request))
            self.scheduler.finish(request, FinishReason.ERROR, error)
        for request, prompt_entries in result.prompt_logprobs.items():
            if not request.prompt_logprobs:
                request.prompt_logprobs.append(None)  # nothing comes before the first token
            request.prompt_logprobs.extend(prompt_entries)
        for request, entry in result.logprobs.items():
            request.logprobs.append(entry)
            request.cumulative_logprob += next(iter(entry.values())).logprob
        for request, embedding in result.embeddings.items():
            request.embedding = embedding
            self.scheduler.finish(request, FinishReason.STOP)
        num_tokens = output.num_decodes
        for item in output.scheduled[output.num_decodes :]:
            remaining = item.request.num_prompt_tokens - item.start
            self.num_prompt_tokens += min(max(remaining, 0), item.num_scheduled_tokens)
            num_tokens += item.num_scheduled_tokens
        self.step_tokens.observe(num_tokens, output.num_steps)
        self.scheduler.advance(output, result.sampled)
        self.num_generated_tokens += sum(map(len, result.sampled.values()))
        changed = [*result.sampled, *result.embeddings, *result.failed]
        for request in changed:
            if request.is_finished:
                self._retire(request)
        return changed

    def _recover(self, outputs: list[SchedulerOutput], error: BaseException) -> list[Request]:
        """After an exception in a step: fail the requests of the step, start the others again.

        What the step had changed by then is unknown, so no page survives it.
        """
        self._pending.clear()
        if _is_device_dead(self.runner, error):
            dead = EngineDeadError("the GPU reported an error that only a kernel restart clears")
            dead.__cause__ = error
            _clear_frames(error)
            self.fail_all(dead)
            raise dead
        logger.error("a step failed; its requests end with this error", exc_info=error)
        _clear_frames(error)
        used = {b for r in self.scheduler.requests.values() for b in r.block_table}
        changed = self.scheduler.restart()
        self.runner.batch.clear()
        self.runner.zero_blocks(sorted(used))
        if outputs:
            affected = [item.request for output in outputs for item in output.scheduled]
        else:  # scheduling itself failed: trying again with the same requests would fail again
            affected = list(self.scheduler.requests.values())
        for request in affected:
            if request.is_finished:
                continue
            failure = RequestFailedError(f"a step of the engine failed: {_describe(error)}")
            failure.__cause__ = error
            self.scheduler.finish(request, FinishReason.ERROR, failure)
            changed.append(request)
        for request in changed:
            self._retire(request)
        if self.check_integrity:
            self.scheduler.check_integrity()
        return changed

    def _retire(self, request: Request) -> None:
        self.runner.batch.remove(request)
        assert request.finish_reason is not None
        self.finished_counts[request.finish_reason] += 1


def _snapshot(request: Request, now: float) -> RequestSnapshot:
    return RequestSnapshot(
        request_id=request.request_id,
        source=request.source,
        status=request.status.value,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        max_tokens=request.max_tokens if request.pooling_params is None else 0,
        num_cached_tokens=request.num_cached_tokens,
        num_blocks=len(request.block_table),
        num_preemptions=request.metrics.num_preemptions,
        age_s=now - request.metrics.arrival_time,
    )


def _is_device_dead(runner: Runner[Any], error: BaseException) -> bool:
    """True if the CUDA context is lost: from then on every call on the device fails."""
    if runner.device.type != "cuda":
        return False
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return False
    try:
        torch.cuda.synchronize(runner.device)
    except RuntimeError:
        return True
    return False


def _clear_frames(error: BaseException | None) -> None:
    """Drop the locals of the frames that an error passed through.

    Users keep errors (IPython keeps the last one); its frames must not keep tensors alive. The
    traceback still prints.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
