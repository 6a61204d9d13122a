"""PendingStep: a step that was enqueued on the device, and the result that it will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nbllm.engine.batch import RING
from nbllm.engine.logprobs import LogprobReport
from nbllm.engine.pooler import PooledStates
from nbllm.engine.request import Request
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from nbllm.errors import RequestFailedError
from nbllm.outputs import PositionLogprobs
from nbllm_kernels import BAD_LOGITS


@dataclass(slots=True)
class StepOutput:
    """What a step produced.

    Attributes:
        sampled: the new tokens of each request whose last token was computed, one for every step
            up to the one that ended it.
        logprobs: log-probabilities at the sampled position, for requests that want them.
        prompt_logprobs: those of the prompt tokens that this step scored, likewise.
        embeddings: [output_size] float32 of each request whose prompt was pooled to its end.
        failed: requests whose logits were not numbers, or that allow no token.
    """

    sampled: dict[Request, list[int]] = field(default_factory=dict)
    logprobs: dict[Request, PositionLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[PositionLogprobs]] = field(default_factory=dict)
    embeddings: dict[Request, np.ndarray] = field(default_factory=dict)
    failed: dict[Request, RequestFailedError] = field(default_factory=dict)

    def forget(self, request: Request) -> None:
        """Drop what is said of one request."""
        for name in ("sampled", "logprobs", "prompt_logprobs", "embeddings", "failed"):
            getattr(self, name).pop(request, None)


@dataclass(slots=True)
class PendingStep:
    """A step that was enqueued on the device.

    Attributes:
        output: what it computes.
        sampled: the requests that it samples for.
        generated: [len(sampled), RING] int64, their rows of `DecodeState.generated` after the
            step; on its way to the host until `event`, as the next is.
        logprobs: of those of `sampled` that report them, in order.
        pooled: the embeddings that are complete with it.
        event: None where nothing runs behind the host's back.
        result_so_far: what is known of the result already.
        launched: `time.monotonic()` before it was enqueued.
    """

    output: SchedulerOutput
    sampled: Sequence[ScheduledRequest]
    generated: Tensor
    logprobs: LogprobReport | None
    pooled: PooledStates | None
    event: torch.cuda.Event | None
    result_so_far: StepOutput
    launched: float

    def result(self) -> StepOutput:
        """Wait for the step, and put its result together."""
        if self.event is not None:
            self.event.synchronize()
        result = self.result_so_far
        if self.pooled is not None:
            self._read_embeddings(self.pooled, result)
        if not self.sampled:
            return result
        first_positions = np.array([item.first_position for item in self.sampled])
        positions = first_positions[:, None] + np.arange(self.output.num_steps)
        entries = np.take_along_axis(self.generated.numpy(), positions % RING, axis=1)
        entries = entries - BAD_LOGITS  # from zero on, so that the halves don't borrow
        counts = (entries >> 32 == positions).sum(axis=1).tolist()
        tokens = ((entries & 0xFFFF_FFFF) + BAD_LOGITS).tolist()
        for item, row, count in zip(self.sampled, tokens, counts, strict=True):
            request = item.request
            if request in result.failed:
                continue
            if count and row[count - 1] == BAD_LOGITS:
                result.failed[request] = _not_numbers("logits")
            else:
                result.sampled[request] = row[:count]
        if self.logprobs is not None:
            requests = [i.request for i in self.sampled if i.request.reports_logprobs]
            result.logprobs.update(zip(requests, self.logprobs.entries(), strict=True))
        return result

    def _read_embeddings(self, pooled: PooledStates, result: StepOutput) -> None:
        vectors = pooled.vectors.numpy().copy()  # the rows outlive the step, its buffers should not
        are_numbers = np.isfinite(vectors).all(axis=1).tolist()
        for request, vector, is_number in zip(pooled.requests, vectors, are_numbers, strict=True):
            if is_number:
                result.embeddings[request] = vector
            else:
                result.failed[request] = _not_numbers("hidden states")


def _not_numbers(what: str) -> RequestFailedError:
    return RequestFailedError(
        f"the model computed {what} that are not numbers (NaN or infinite): "
        "the weights are damaged, or overflow in this dtype (try dtype='float32')"
    )
