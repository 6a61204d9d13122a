"""Sampler: from the logits of a step to one token per row.

The order of operations, each only for the rows that ask for it (vLLM's order):

1. `structured_outputs` and `allowed_token_ids`: all others are forbidden.
2. `bad_words`: an id that would complete one is forbidden.
3. `min_tokens`: end-of-sequence and stop ids are forbidden until then.
4. `logit_bias` is added.
5. Repetition penalty over prompt and output, then frequency and presence penalties over the output.
6. Temperature, min-p, top-k, top-p, and the draw: `nbllm_kernels.sample`.

Forbidden means a logit of minus infinity. The first four come from the host (`restrict`); the rest
needs nothing but tables on the device (`draw`), so a captured step can hold it. The draw is
stateless: its noise is a function of (seed, position, token id), so a row's token does not depend
on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nbllm.engine.batch import Batch
from nbllm.engine.logprobs import LogprobTensors, gather_logprobs
from nbllm.engine.request import Request
from nbllm.engine.scheduler_output import ScheduledRequest
from nbllm.errors import RequestFailedError
from nbllm.models.causal_lm import CausalLM
from nbllm_kernels import (
    DecodeInputs,
    DecodeState,
    SamplingTensors,
    append_tokens,
    apply_penalties,
    count_tokens,
    sample,
)


@dataclass(frozen=True, slots=True)
class SamplingKind:
    """What of the sampler a batch needs.

    Attributes:
        all_greedy, any_filter: as in `SamplingTensors`.
        any_penalty: some row's logits depend on the tokens so far.
        any_logprob: some row reports log-probabilities.
    """

    all_greedy: bool = False
    any_filter: bool = False
    any_penalty: bool = False
    any_logprob: bool = False

    @property
    def needs_logits(self) -> bool:
        """Whether anything but the draw reads the logits."""
        return self.any_penalty or self.any_logprob

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledRequest]) -> SamplingKind:
        """The least that serves all of `scheduled`."""
        requests = [item.request for item in scheduled]
        params = [request.sampling_params for request in requests]
        return cls(
            all_greedy=all(p.temperature == 0.0 for p in params),
            any_filter=any(
                p.temperature != 0.0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
                for p in params
            ),
            any_penalty=any(request.has_penalties for request in requests),
            any_logprob=any(request.reports_logprobs for request in requests),
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


def draw(
    logits: Tensor,
    rows: Tensor,
    params: SamplingTensors,
    kind: SamplingKind,
    batch: Batch,
    report: LogprobTensors | None = None,
) -> Tensor:
    """Steps 5 and 6: sample one token per row and give it to its sequence.

    Args:
        logits: [N, vocab_size]; left as they are.
        rows: [N] int64, rows of the batch's tables.
        params: how.
        kind: what of it.
        batch: the tables.
        report: filled with what can be reported of the tokens, if some row wants that.

    Returns:
        [N] int64 token ids; -1 as in `nbllm_kernels.sample`.
    """
    if not kind.any_penalty:
        token_ids = sample(logits, params)
    else:
        token_ids = sample(apply_penalties(logits, rows, batch.penalties), params)
        count_tokens(batch.penalties, rows, token_ids)
    append_tokens(batch.state, rows, token_ids)
    if kind.any_logprob and report is not None:
        num_top = report.top_ids.shape[1]
        report.copy_(gather_logprobs(logits, token_ids.clamp(min=0), num_top))
    return token_ids


def choose(
    model: CausalLM,
    hidden: Tensor,
    rows: Tensor,
    params: SamplingTensors,
    kind: SamplingKind,
    batch: Batch,
    report: LogprobTensors | None,
) -> Tensor:
    """`draw` from hidden states, [N, hidden_size], without stored logits where that is faster."""
    if kind.needs_logits:
        return draw(model.compute_logits(hidden), rows, params, kind, batch, report)
    token_ids = model.lm_head.sample(hidden, params)
    append_tokens(batch.state, rows, token_ids)
    return token_ids


def restrict(
    logits: Tensor, sampled: Sequence[ScheduledRequest]
) -> dict[Request, RequestFailedError]:
    """Steps 1 to 4 of `Sampler`, in place.

    Args:
        logits: [len(sampled), vocab_size] float32.
        sampled: one per row.

    Returns:
        requests that allow no token at all, each with the error that it ends with. The parameters
        can't be checked for that beforehand: it depends on the tokens so far.
    """
    constrained: dict[int, Request] = {}
    allowed: dict[int, list[int]] = {}
    forbidden: dict[int, list[int]] = {}
    biases: dict[int, dict[int, float]] = {}
    failed: dict[Request, RequestFailedError] = {}
    for row, item in enumerate(sampled):
        params = item.request.sampling_params
        if item.request.constraint is not None:
            constrained[row] = item.request
        ids = forbidden_ids(item)
        if ids:
            forbidden[row] = ids
        if params.allowed_token_ids is not None:
            allowed[row] = params.allowed_token_ids
            if set(params.allowed_token_ids) <= set(ids):
                failed[item.request] = _dead_end("allowed_token_ids")
        if params.logit_bias:
            biases[row] = params.logit_bias
    if constrained:
        failed |= _apply_constraints(constrained, forbidden, logits)
    if allowed:
        mask = torch.zeros(len(allowed), logits.shape[1], dtype=torch.bool, device=logits.device)
        mask[_pairs(dict(enumerate(allowed.values())), logits)] = True
        _keep(mask, list(allowed), logits)
    if forbidden:
        logits[_pairs(forbidden, logits)] = -torch.inf
    if biases:
        values = [value for bias in biases.values() for value in bias.values()]
        bias = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits.index_put_(_pairs(biases, logits), bias, accumulate=True)
    return failed


def _apply_constraints(
    constrained: Mapping[int, Request], forbidden: Mapping[int, list[int]], logits: Tensor
) -> dict[Request, RequestFailedError]:
    """Forbid what the grammars of some rows do not allow; returns the requests that end there.

    The masks are computed while the device is busy with the forward pass, which is enqueued.
    """
    constraints = [request.constraint for request in constrained.values()]
    first = constraints[0]
    assert first is not None
    words = np.zeros((len(constraints), first.num_mask_words), dtype=np.int32)
    failed: dict[Request, RequestFailedError] = {}
    errors = first.fill_masks(constraints, words)
    octets = words.view(np.uint8)
    for place, (row, request) in enumerate(constrained.items()):
        error = errors[place]
        ids = forbidden.get(row, [])
        others = request.sampling_params.allowed_token_ids
        if error is None and (ids or others is not None):
            bits = np.unpackbits(octets[place], bitorder="little").astype(bool)
            bits[ids] = False
            if not (bits.any() if others is None else bits[others].any()):
                error = _dead_end("structured_outputs")
        if error is not None:
            failed[request] = error
    # A byte of the mask looks up its eight bits.
    lookup = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    bytes_ = torch.from_numpy(octets).to(logits.device)
    mask = lookup.to(device=logits.device, dtype=torch.bool)[bytes_.long()].flatten(1)
    _keep(mask[:, : logits.shape[1]], list(constrained), logits)
    return failed


def _keep(mask: Tensor, rows: list[int], logits: Tensor) -> None:
    """Forbid in some rows what is False in `mask`, [len(rows), vocab_size]."""
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill_(~mask, -torch.inf)


def _dead_end(name: str) -> RequestFailedError:
    return RequestFailedError(
        f"no token is left to choose: what else is asked for forbids all that {name} allows at "
        "this place",
        parameter=name,
    )


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


def _completions(bad_words: Sequence[Sequence[int]], request: Request) -> list[int]:
    """Ids that would complete a bad word after the output so far."""
    longest = max(len(word) for word in bad_words)
    start = max(request.num_prompt_tokens, request.num_tokens - longest + 1)
    tail = request.token_ids[start:].tolist()
    return [
        word[-1]
        for word in bad_words
        if len(word) == 1 or list(word[:-1]) == tail[len(tail) - len(word) + 1 :]
    ]
