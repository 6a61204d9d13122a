"""threshold_kernel: the border of what a row's filters leave, found by reading the whole row."""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels.gpu.scaled_logits import order_key, scaled_logits
from nbllm_kernels.gpu.threshold_search import (
    NO_LIMIT,
    find_border,
    find_highest,
    key_range,
    measure,
)


@triton.jit
def threshold_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    temperature_ptr: tl.tensor,  # [N] float32
    top_k_ptr: tl.tensor,  # [N] int32
    top_p_ptr: tl.tensor,  # [N] float32
    min_p_ptr: tl.tensor,  # [N] float32
    sure_ptr: tl.tensor,  # [N] int32: logits with this order key and above stay
    tied_ptr: tl.tensor,  # [N] int32: those between this and `sure` stay up to an id
    limit_ptr: tl.tensor,  # [N] int32: that id
    is_left_ptr: tl.tensor,  # [N] int32: rows that `shortlist_kernel` left
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if tl.load(is_left_ptr + row) == 0:
        return
    logits_ptr += row * stride_row
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    offsets = tl.arange(0, BLOCK)
    highest = find_highest(logits_ptr, temperature, VOCAB_SIZE, BLOCK)
    low, high = key_range(highest, min_p)
    # Not used: the row is not listed.
    keys, masses = tl.zeros((1,), tl.int32), tl.zeros((1,), tl.float32)
    count, _n1, _n2, mass, _m1, _m2 = measure(
        logits_ptr, temperature, highest, low, high, high, VOCAB_SIZE, BLOCK
    )
    low, sure, num_kept = find_border(
        logits_ptr,
        temperature,
        highest,
        keys,
        masses,
        low,
        high,
        count,
        mass,
        count,
        mass,
        top_k,
        top_p,
        VOCAB_SIZE,
        BLOCK,
        False,
    )
    limit = tl.full((), NO_LIMIT, tl.int32)
    if num_kept > 0:
        seen = 0
        for first in range(0, VOCAB_SIZE, BLOCK):
            key = order_key(scaled_logits(logits_ptr, first + offsets, temperature, VOCAB_SIZE))
            tied = ((key >= low) & (key < sure)).to(tl.int32)
            rank = seen + tl.cumsum(tied, axis=0)
            is_last = (tied > 0) & (rank == num_kept)
            here = tl.max(tl.where(is_last, first + offsets, -1), axis=0)
            limit = tl.where(here >= 0, here, limit)
            seen += tl.sum(tied, axis=0)
    tl.store(sure_ptr + row, sure.to(tl.int32))
    tl.store(tied_ptr + row, low.to(tl.int32))
    tl.store(limit_ptr + row, limit)
