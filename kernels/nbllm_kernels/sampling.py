"""Sampling: from logits to one token id per row, with noise that is a pure function.

A token is drawn by the Gumbel-max trick (Gumbel 1954): argmax(logits / temperature + noise), where
the noise of each token id is a hash of (seed, position, id). The same row gets the same token in
any batch, in any slot, after any replay. Filters only remove candidates, so the survivors keep
their noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbllm_kernels import reference
from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.gumbel import gumbel_noise, gumbel_noise_of_ids
from nbllm_kernels.sampling_tensors import SamplingTensors

_NUM_CANDIDATES = 256  # most likely ids among which filtered rows are drawn, if they suffice


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """One token id per row, always below vocab_size; or -1, see below.

    In this order: temperature, then min_p, top_k and top_p (each on what the one before left,
    renormalized), then the draw. Ties at the k-th place are all kept, as in transformers; top_p
    keeps the smallest set, most likely ids first and lower ids first among equals, whose
    probability reaches top_p; never fewer than one id.

    Args:
        logits: [N, vocab_size], of a floating-point dtype; computed in float32.
        params: one entry per row.

    Returns:
        [N] int64; -1 for a row from which nothing can be drawn: one that holds NaN or infinity,
        or nothing but minus infinity.

    Raises:
        ValueError: logits are not [N, vocab_size] numbers.
    """
    if logits.ndim != 2 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits must be [N, vocab_size] floats: {logits.shape}, {logits.dtype}")
    if runs_triton(logits):
        from nbllm_kernels.gpu import sampling as gpu

        return gpu.sample(logits, params)
    if params.all_greedy or not params.any_filter:
        return reference.sample(logits, params)
    logits = logits.float()
    return reference.mark_bad_rows(_sample_filtered(logits, params), logits)


def _sample_filtered(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Draw among the most likely ids; rows whose filters keep more take the plain way.

    Which way a row goes depends on that row alone, so its token does too.
    """
    vocab_size = logits.shape[-1]
    num_candidates = min(_NUM_CANDIDATES, vocab_size)
    scaled = logits / torch.where(params.temperature == 0, 1.0, params.temperature)[:, None]
    log_probability = torch.log_softmax(scaled, dim=-1)  # row by row, whatever the batch
    values, ids = scaled.topk(num_candidates, dim=-1)
    # Equal values in the order of their ids.
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, by_value)

    k = torch.where(params.top_k > 0, params.top_k, vocab_size).clamp(max=num_candidates).long()
    kth = values.gather(-1, k[:, None] - 1)
    has_k = (params.top_k > 0) & (params.top_k <= num_candidates)
    floor = torch.maximum(
        torch.where(has_k[:, None], kth, -torch.inf),
        values[:, :1] + torch.log(params.min_p)[:, None],
    )
    kept = values.masked_fill(values < floor, -torch.inf)
    last = values[:, -1:]
    complete = (last < floor) | (num_candidates == vocab_size)  # nothing kept lies outside
    probability = torch.where(
        complete, torch.softmax(kept, dim=-1), log_probability.gather(-1, ids).exp()
    )
    before = probability.cumsum(dim=-1) - probability
    top_p = params.top_p[:, None]
    beyond = (before >= top_p) & (top_p < 1.0) & (before > 0)
    # Without a complete set, top_p must close it: by probabilities that neither min_p nor a
    # larger top_k would have renormalized, and above the ties of the last candidate.
    closed = beyond.any(dim=-1) & (params.min_p == 0) & (params.top_k == 0)
    smallest = values.masked_fill(beyond, torch.inf).amin(dim=-1)
    closed &= smallest > last[:, 0]
    kept = kept.masked_fill(beyond, -torch.inf)

    noise = gumbel_noise_of_ids(params.seeds, params.positions, ids)
    choice = noise.add_(kept).argmax(dim=-1, keepdim=True)
    tokens = ids.gather(-1, choice)[:, 0]
    is_greedy = params.temperature == 0
    tokens = torch.where(is_greedy, logits.argmax(dim=-1), tokens)
    plain = torch.nonzero(~(complete[:, 0] | closed | is_greedy))[:, 0]
    if len(plain):
        tokens[plain] = reference.sample(logits[plain], _rows(params, plain))
    return tokens


def _rows(params: SamplingTensors, rows: Tensor) -> SamplingTensors:
    return SamplingTensors(
        temperature=params.temperature[rows],
        top_k=params.top_k[rows],
        top_p=params.top_p[rows],
        min_p=params.min_p[rows],
        seeds=params.seeds[rows],
        positions=params.positions[rows],
        all_greedy=False,
        any_filter=True,
    )


__all__ = ["SamplingTensors", "gumbel_noise", "sample"]
