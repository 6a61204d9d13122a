"""Sampler: from the logits of a step to one token per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nbllm.engine.batch import FREQUENCY, PRESENCE, REPETITION, Batch, StepInput
from nbllm.engine.request import Request
from nbllm.engine.scheduler_output import ScheduledRequest
from nbllm.errors import RequestFailedError
from nbllm_kernels import DecodeInputs, DecodeState, SamplingTensors, sample


@dataclass(frozen=True, slots=True)
class SamplingKind:
    """What of the sampler a batch needs; as in `SamplingTensors`."""

    all_greedy: bool
    any_filter: bool

    @classmethod
    def of(cls, requests: Sequence[Request]) -> SamplingKind:
        """The least that serves all of `requests`."""
        params = [request.sampling_params for request in requests]
        return cls(
            all_greedy=all(p.temperature == 0.0 for p in params),
            any_filter=any(
                p.temperature != 0.0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
                for p in params
            ),
        )

    def tensors(
        self, columns: DecodeInputs | DecodeState, positions: Tensor, rows: Tensor | None = None
    ) -> SamplingTensors:
        """How to sample all rows of `columns`, or some; `positions` has one entry for each."""
        temperature, top_k, top_p, min_p, seeds = (
            column if rows is None else column[rows]
            for column in (
                columns.temperature,
                columns.top_k,
                columns.top_p,
                columns.min_p,
                columns.seeds,
            )
        )
        return SamplingTensors(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            all_greedy=self.all_greedy,
            any_filter=self.any_filter,
        )


class Sampler:
    """Samples the next token of every row.

    The order of operations, each only for the rows that ask for it (vLLM's order):

    1. `allowed_token_ids`: all others are forbidden.
    2. `bad_words`: an id that would complete one is forbidden.
    3. `min_tokens`: end-of-sequence and stop ids are forbidden until then.
    4. `logit_bias` is added.
    5. Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1) over prompt and
       output, then frequency and presence penalties over the output.
    6. Temperature, min-p, top-k, top-p, and the draw: `nbllm_kernels.sample`.

    Forbidden means a logit of minus infinity. The draw is stateless: its noise is a function of
    (seed, position, token id), so a row's token does not depend on its neighbours.
    """

    def __call__(self, logits: Tensor, step: StepInput, batch: Batch) -> Tensor:
        """Sample one token per row.

        Args:
            logits: [num_sampled, vocab_size] float32; overwritten.
            step: the step that computed them.
            batch: the tables.

        Returns:
            [num_sampled] int64 token ids; -1 as in `nbllm_kernels.sample`.
        """
        requests = [item.request for item in step.sampled]
        restrict(logits, step.sampled)
        penalized = [i for i, r in enumerate(requests) if r.has_penalties]
        if penalized:
            self._apply_penalties(logits, step, batch, penalized)
        state, rows = batch.state, step.sampled_rows
        positions = state.num_tokens[rows].to(torch.int64)
        return sample(logits, SamplingKind.of(requests).tensors(state, positions, rows))

    def _apply_penalties(
        self, logits: Tensor, step: StepInput, batch: Batch, penalized: list[int]
    ) -> None:
        assert batch.prompt_mask is not None
        assert batch.output_counts is not None
        index = torch.tensor(penalized, device=logits.device)
        rows = step.sampled_rows[index]
        penalties = batch.penalties[rows]
        logits[index] = apply_penalties(
            logits[index],
            batch.prompt_mask[rows],
            batch.output_counts[rows],
            repetition=penalties[:, REPETITION],
            frequency=penalties[:, FREQUENCY],
            presence=penalties[:, PRESENCE],
        )


def apply_penalties(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    *,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """Lower the logits of ids that occurred already.

    Args:
        logits: [N, vocab_size] float32.
        prompt_mask: [N, vocab_size] bool, ids that stand in the prompt.
        output_counts: [N, vocab_size] int32, how often each id was generated.
        repetition: [N] float32, > 0; divides positive logits, multiplies negative ones.
        frequency: [N] float32, subtracted once per occurrence in the output.
        presence: [N] float32, subtracted once if the id occurs in the output.

    Returns:
        [N, vocab_size] float32.
    """
    seen = prompt_mask | (output_counts > 0)
    factor = repetition[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(seen, repeated, logits)
    logits = logits - frequency[:, None] * output_counts
    return logits - presence[:, None] * (output_counts > 0)


def restrict(logits: Tensor, sampled: Sequence[ScheduledRequest]) -> None:
    """Steps 1 to 4 of `Sampler`, in place.

    Args:
        logits: [len(sampled), vocab_size] float32.
        sampled: one per row.
    """
    allowed: dict[int, list[int]] = {}
    forbidden: dict[int, list[int]] = {}
    biases: dict[int, dict[int, float]] = {}
    for row, item in enumerate(sampled):
        params = item.request.sampling_params
        if params.allowed_token_ids is not None:
            allowed[row] = params.allowed_token_ids
        ids = forbidden_ids(item)
        if ids:
            forbidden[row] = ids
        if params.logit_bias:
            biases[row] = params.logit_bias
    if allowed:
        mask = torch.zeros(len(allowed), logits.shape[1], dtype=torch.bool, device=logits.device)
        mask[_pairs(dict(enumerate(allowed.values())), logits)] = True
        rows = torch.tensor(list(allowed), device=logits.device)
        logits[rows] = logits[rows].masked_fill_(~mask, -torch.inf)
    if forbidden:
        logits[_pairs(forbidden, logits)] = -torch.inf
    if biases:
        values = [value for bias in biases.values() for value in bias.values()]
        bias = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits.index_put_(_pairs(biases, logits), bias, accumulate=True)


def _pairs(ids_of_rows: Mapping[int, Iterable[int]], logits: Tensor) -> tuple[Tensor, ...]:
    """Index of the given ids in the given rows."""
    pairs = [(row, token_id) for row, ids in ids_of_rows.items() for token_id in ids]
    return torch.tensor(pairs, dtype=torch.int64, device=logits.device).unbind(dim=1)


def forbidden_ids(item: ScheduledRequest) -> list[int]:
    """Ids that `bad_words` and `min_tokens` forbid as the token that is sampled."""
    request, params = item.request, item.request.sampling_params
    forbidden: list[int] = []
    if request.bad_words_token_ids:
        forbidden += _completions(request.bad_words_token_ids, request)
    if item.first_position - request.num_prompt_tokens < params.min_tokens:
        forbidden += [*request.eos_token_ids, *(params.stop_token_ids or ())]
    return forbidden


def find_dead_ends(
    sampled: Sequence[ScheduledRequest],
) -> dict[Request, RequestFailedError]:
    """Requests that allow no token at all, each with the error that it ends with.

    The parameters can't be checked for that beforehand: it depends on the tokens so far.
    """
    errors: dict[Request, RequestFailedError] = {}
    for item in sampled:
        allowed = item.request.sampling_params.allowed_token_ids
        if allowed is not None and set(allowed) <= set(forbidden_ids(item)):
            errors[item.request] = RequestFailedError(
                "no token is left to choose: bad_words and min_tokens forbid all of "
                "allowed_token_ids at this place"
            )
    return errors


def _completions(bad_words: Sequence[Sequence[int]], request: Request) -> list[int]:
    """Ids that would complete a bad word after the output so far."""
    longest = max(len(word) for word in bad_words)
    start = max(request.num_prompt_tokens, request.num_tokens - longest + 1)
    tail = request.token_ids[start:]
    return [
        word[-1]
        for word in bad_words
        if len(word) == 1 or list(word[:-1]) == tail[len(tail) - len(word) + 1 :]
    ]
