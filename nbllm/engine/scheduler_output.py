"""SchedulerOutput: what one step computes, as the scheduler tells the runner and the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nbllm.engine.request import Request


class ScheduledRequest(NamedTuple):
    """One request's share of a step.

    Attributes:
        request: whose.
        start: position of the first token that is computed.
        num_scheduled_tokens: how many are, from there on.
        num_sampled_tokens: how many are sampled at most: none before the last token is computed,
            one, or one in each of several steps in a row. An embedding counts as one.
        shapes_logits: `Request.shapes_logits`, before the step.
    """

    request: Request
    start: int
    num_scheduled_tokens: int
    num_sampled_tokens: int
    shapes_logits: bool

    @property
    def first_position(self) -> int:
        """Position of the first token that is sampled."""
        return self.start + self.num_scheduled_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step computes.

    Attributes:
        scheduled: requests that decode (one token each, input sampled by an earlier step) come
            first, the others after them.
        num_decodes: how many of `scheduled` decode.
        released: requests that no step needs in the tables of the device any more: they were
            preempted, or earlier steps complete them.
        num_steps: the step is run so many times in a row, each time on the tokens that the last
            one sampled; more than one only if all requests decode.
    """

    scheduled: tuple[ScheduledRequest, ...]
    num_decodes: int
    released: tuple[Request, ...]
    num_steps: int = 1

    @property
    def only_decodes(self) -> bool:
        """True if every request of the step decodes."""
        return self.num_decodes == len(self.scheduled)

    @property
    def shapes_logits(self) -> bool:
        """True if the step can't run on the device alone."""
        return any(item.shapes_logits for item in self.scheduled)

    @property
    def reports_logprobs(self) -> bool:
        """True if more is reported of some token than its id."""
        return any(item.request.reports_logprobs for item in self.scheduled)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes, each time that it is run."""
        return sum(item.num_scheduled_tokens for item in self.scheduled)
