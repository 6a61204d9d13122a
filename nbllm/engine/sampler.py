"""Sampler: from the logits of a step to one token per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbllm.engine.batch import (
    FREQUENCY,
    MIN_P,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TOP_P,
    Batch,
    StepInput,
    has_penalties,
)
from nbllm.engine.request import Request
from nbllm_kernels import SamplingTensors, sample


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
            [num_sampled] int64 token ids.
        """
        requests = step.sampled_requests
        for row, request in enumerate(requests):
            restrict(logits[row], request)
        penalized = [i for i, r in enumerate(requests) if has_penalties(r.sampling_params)]
        if penalized:
            self._apply_penalties(logits, step, batch, penalized)
        floats = batch.floats[step.sampled_rows]
        params = [request.sampling_params for request in requests]
        tensors = SamplingTensors(
            temperature=floats[:, TEMPERATURE],
            top_k=batch.top_k[step.sampled_rows],
            top_p=floats[:, TOP_P],
            min_p=floats[:, MIN_P],
            seeds=batch.seeds[step.sampled_rows],
            positions=step.next_positions,
            all_greedy=all(p.temperature == 0.0 for p in params),
            any_filter=any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params),
        )
        return sample(logits, tensors)

    def _apply_penalties(
        self, logits: Tensor, step: StepInput, batch: Batch, penalized: list[int]
    ) -> None:
        assert batch.prompt_mask is not None
        assert batch.output_counts is not None
        index = torch.tensor(penalized, device=logits.device)
        rows = step.sampled_rows[index]
        floats = batch.floats[rows]
        logits[index] = apply_penalties(
            logits[index],
            batch.prompt_mask[rows],
            batch.output_counts[rows],
            repetition=floats[:, REPETITION],
            frequency=floats[:, FREQUENCY],
            presence=floats[:, PRESENCE],
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


def restrict(logits: Tensor, request: Request) -> None:
    """Steps 1 to 4 of `Sampler` on one row ([vocab_size] float32), in place."""
    params = request.sampling_params
    if params.allowed_token_ids is not None:
        allowed = _index(params.allowed_token_ids, logits)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
    if request.bad_words_token_ids:
        forbidden = _completions(request.bad_words_token_ids, request.output_token_ids)
        if forbidden:
            logits[_index(forbidden, logits)] = -torch.inf
    if request.num_output_tokens < params.min_tokens:
        stops = [*request.eos_token_ids, *(params.stop_token_ids or ())]
        if stops:
            logits[_index(stops, logits)] = -torch.inf
    if params.logit_bias:
        ids = _index(list(params.logit_bias), logits)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits.device)
        logits[ids] += bias.to(logits.dtype)


def _completions(bad_words: Sequence[Sequence[int]], output: list[int]) -> list[int]:
    """Ids that would complete a bad word after `output`."""
    return [
        word[-1]
        for word in bad_words
        if len(word) == 1 or list(word[:-1]) == output[len(output) - len(word) + 1 :]
    ]


def _index(ids: Sequence[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=logits.device)
