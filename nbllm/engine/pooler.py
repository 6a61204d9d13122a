"""Pooler: from the hidden states of prompts to one vector of each.

A prompt that is computed in several steps leaves the sum of its states in a table with a row for
each running request. The first step of a prompt starts the sum, so that a row needs no clearing
when it gets another owner, nor a prompt when it is preempted and computed again. Sums are kept in
float64: there they are the same, but for a last bit at most, however the prompt was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbllm.engine.batch import Batch
from nbllm.engine.request import Request
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput


@dataclass(slots=True)
class PooledStates:
    """The embeddings that a step completes.

    Attributes:
        requests: whose they are.
        vectors: [len(requests), hidden_size] float32; may still be on their way to the host.
    """

    requests: list[Request]
    vectors: Tensor


class Pooler:
    """Pools the prompts of steps, which come in the order in which they run.

    Args:
        batch: whose rows the sums have.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._sums: Tensor | None = None  # [max_num_seqs + 1, hidden_size] float64

    def pool(self, hidden: Tensor, output: SchedulerOutput) -> PooledStates | None:
        """The embeddings of prompts that end in this step; None if there are none.

        Args:
            hidden: [num_tokens, hidden_size], of the step's tokens in its order.
            output: the step.
        """
        rows: dict[Request, int] = {}  # of `hidden`
        means: dict[Request, Tensor] = {}
        end = output.num_decodes
        for item in output.scheduled[output.num_decodes :]:
            begin, end = end, end + item.num_scheduled_tokens
            request, params = item.request, item.request.pooling_params
            if params is None:
                continue
            if params.pooling == "mean":
                total = self._sum(item, hidden[begin:end])
                if item.num_sampled_tokens:
                    means[request] = total / request.num_prompt_tokens
            elif item.num_sampled_tokens:  # an encoder, which has a first state, takes it whole
                rows[request] = begin if params.pooling == "cls" else end - 1
        vectors: list[Tensor] = []
        if rows:
            vectors.append(hidden[self._batch.to_device(list(rows.values()))[0]].float())
        if means:
            vectors.append(torch.stack(list(means.values())).float())
        return PooledStates([*rows, *means], torch.cat(vectors)) if vectors else None

    def _sum(self, item: ScheduledRequest, states: Tensor) -> Tensor:
        """[hidden_size] float64, of all states of a prompt so far."""
        total = states.sum(dim=0, dtype=torch.float64)
        if not item.start and item.num_sampled_tokens:
            return total
        if self._sums is None:
            shape = (self._batch.max_num_seqs + 1, states.shape[1])
            self._sums = torch.zeros(shape, dtype=torch.float64, device=states.device)
        so_far = self._sums[self._batch.rows[item.request]]
        if item.start:
            total += so_far
        so_far.copy_(total)
        return total
