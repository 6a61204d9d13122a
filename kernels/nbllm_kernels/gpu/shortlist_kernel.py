"""shortlist_kernel: the border of what a row's filters leave, found among its largest logits.

It is one long function: what it counts while it collects the list decides whether the list will do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels.gpu.scaled_logits import order_key, scaled_logits
from nbllm_kernels.gpu.threshold_search import (
    LOWEST_KEY,
    NO_LIMIT,
    find_border,
    find_highest,
    key_range,
)

_LISTED_RANGE = tl.constexpr(10.0)  # below the highest: to a 20,000th of its probability


@triton.jit
def shortlist_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    temperature_ptr: tl.tensor,  # [N] float32
    top_k_ptr: tl.tensor,  # [N] int32
    top_p_ptr: tl.tensor,  # [N] float32
    min_p_ptr: tl.tensor,  # [N] float32
    sure_ptr: tl.tensor,  # [N] int32, as in `threshold_kernel`
    tied_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    is_left_ptr: tl.tensor,  # [N] int32: 1 for a row that `threshold_kernel` must do
    value_ptr: tl.tensor,  # [N, CAPACITY] float32: the list, in the order of ids
    id_ptr: tl.tensor,  # [N, CAPACITY] int32
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    lowest_key = tl.full((), LOWEST_KEY, tl.int32)
    tl.store(sure_ptr + row, lowest_key)
    tl.store(tied_ptr + row, lowest_key)
    tl.store(limit_ptr + row, tl.full((), NO_LIMIT, tl.int32))
    tl.store(is_left_ptr + row, 0)
    filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if (temperature == 0.0) | (filters == 0):
        return
    highest = find_highest(logits_ptr, temperature, VOCAB_SIZE, BLOCK)
    if (highest == float("-inf")) | (highest == float("inf")):
        return  # nothing can be drawn from it
    low, high = key_range(highest, min_p)
    if (top_k == 0) & (top_p >= 1.0):  # min_p alone
        tl.store(sure_ptr + row, low.to(tl.int32))
        tl.store(tied_ptr + row, low.to(tl.int32))
        return
    cut = highest - _LISTED_RANGE
    offsets = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), dtype=tl.int32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    num_listed = tl.full((), 0, tl.int32)
    for first in range(0, VOCAB_SIZE, BLOCK):
        x = scaled_logits(logits_ptr, first + offsets, temperature, VOCAB_SIZE)
        is_kept = order_key(x) >= low
        counts += is_kept.to(tl.int32)
        sums += tl.where(is_kept, tl.exp(x - highest), 0.0)
        is_listed = is_kept & (x >= cut)
        place = num_listed + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        mask = is_listed & (place < CAPACITY)
        tl.store(value_ptr + row * CAPACITY + place, x, mask=mask)
        tl.store(id_ptr + row * CAPACITY + place, first + offsets, mask=mask)
        num_listed += tl.sum(is_listed.to(tl.int32), axis=0)
    if num_listed > CAPACITY:
        tl.store(is_left_ptr + row, 1)
        return
    count, mass = tl.sum(counts, axis=0), tl.sum(sums, axis=0)
    tl.debug_barrier()  # the list was written by other threads
    places = tl.arange(0, CAPACITY)
    values = tl.load(
        value_ptr + row * CAPACITY + places, mask=places < num_listed, other=float("-inf")
    )
    keys = order_key(values)
    masses = tl.exp(values - highest)
    listed_mass = tl.sum(masses, axis=0)
    is_cut_by_k = (top_k > 0) & (top_k < count)
    lies_below = tl.where(is_cut_by_k, num_listed < top_k, listed_mass < top_p * mass)
    if is_cut_by_k | (top_p < 1.0):
        if lies_below:
            tl.store(is_left_ptr + row, 1)
            return
        lowest_listed = tl.min(tl.where(places < num_listed, keys, NO_LIMIT), axis=0)
        low = tl.maximum(low, lowest_listed.to(tl.int64))
    low, sure, num_kept = find_border(
        logits_ptr,
        temperature,
        highest,
        keys,
        masses,
        low,
        high,
        num_listed,
        listed_mass,
        count,
        mass,
        top_k,
        top_p,
        VOCAB_SIZE,
        BLOCK,
        True,
    )
    limit = tl.full((), NO_LIMIT, tl.int32)
    if num_kept > 0:
        tied = ((keys >= low) & (keys < sure)).to(tl.int32)
        is_last = (tied > 0) & (tl.cumsum(tied, axis=0) == num_kept)
        ids = tl.load(id_ptr + row * CAPACITY + places, mask=places < num_listed, other=-1)
        limit = tl.max(tl.where(is_last, ids, -1), axis=0)
    tl.store(sure_ptr + row, sure.to(tl.int32))
    tl.store(tied_ptr + row, low.to(tl.int32))
    tl.store(limit_ptr + row, limit)
