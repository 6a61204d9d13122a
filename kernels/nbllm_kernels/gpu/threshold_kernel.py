"""threshold_kernel: what min_p, top_k and top_p leave of a row, without sorting it.

By repeated four-way search over the order of the floats it finds the smallest logit that is kept,
and how many of those that equal it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels.gpu.scaled_logits import order_key, scaled_logits

_LOWEST_KEY = tl.constexpr(-0x7F800000)  # of the lowest finite float; -inf is just below
_NO_LIMIT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _measure(
    logits_ptr: tl.tensor,
    temperature: tl.tensor,
    highest: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """How many logits have a key of at least k0, k1, k2, and their sums of exp(x - highest)."""
    offsets = tl.arange(0, BLOCK)
    n0 = tl.zeros((BLOCK,), dtype=tl.int32)
    n1 = tl.zeros((BLOCK,), dtype=tl.int32)
    n2 = tl.zeros((BLOCK,), dtype=tl.int32)
    m0 = tl.zeros((BLOCK,), dtype=tl.float32)
    m1 = tl.zeros((BLOCK,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, VOCAB_SIZE, BLOCK):
        x = scaled_logits(logits_ptr, first + offsets, temperature, VOCAB_SIZE)
        key = order_key(x)
        mass = tl.exp(x - highest)
        n0 += (key >= k0).to(tl.int32)
        n1 += (key >= k1).to(tl.int32)
        n2 += (key >= k2).to(tl.int32)
        m0 += tl.where(key >= k0, mass, 0.0)
        m1 += tl.where(key >= k1, mass, 0.0)
        m2 += tl.where(key >= k2, mass, 0.0)
    return (
        tl.sum(n0, axis=0),
        tl.sum(n1, axis=0),
        tl.sum(n2, axis=0),
        tl.sum(m0, axis=0),
        tl.sum(m1, axis=0),
        tl.sum(m2, axis=0),
    )


@triton.jit
def _search(
    logits_ptr: tl.tensor,
    temperature: tl.tensor,
    highest: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    low_count: tl.tensor,
    low_mass: tl.tensor,
    min_count: tl.tensor,
    min_mass: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest key whose set {x: key(x) >= key} has min_count members and min_mass.

    The set of `low` has, that of `high` has not. Ends when the two sets differ by one logit, or by
    equal ones: returns low, high, the number that differ, the mass of low's set and of high's.
    """
    high_count = 0
    high_mass = 0.0
    while (high - low > 1) & (low_count - high_count > 1):
        width = high - low
        k0 = low + tl.maximum(width // 4, 1)
        k1 = tl.maximum(low + width // 2, k0)
        k2 = tl.maximum(low + width // 4 * 3, k1)
        n0, n1, n2, m0, m1, m2 = _measure(
            logits_ptr, temperature, highest, k0, k1, k2, VOCAB_SIZE, BLOCK
        )
        enough_0 = (n0 >= min_count) & (m0 >= min_mass)
        enough_1 = enough_0 & (n1 >= min_count) & (m1 >= min_mass)
        enough_2 = enough_1 & (n2 >= min_count) & (m2 >= min_mass)
        new_high = tl.where(enough_2, high, tl.where(enough_1, k2, tl.where(enough_0, k1, k0)))
        high_count = tl.where(
            enough_2, high_count, tl.where(enough_1, n2, tl.where(enough_0, n1, n0))
        )
        high_mass = tl.where(
            enough_2, high_mass, tl.where(enough_1, m2, tl.where(enough_0, m1, m0))
        )
        low_count = tl.where(
            enough_2, n2, tl.where(enough_1, n1, tl.where(enough_0, n0, low_count))
        )
        low_mass = tl.where(enough_2, m2, tl.where(enough_1, m1, tl.where(enough_0, m0, low_mass)))
        low = tl.where(enough_2, k2, tl.where(enough_1, k1, tl.where(enough_0, k0, low)))
        high = new_high
    return low, high, low_count - high_count, low_count, low_mass, high_mass


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
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    lowest_key = tl.full((), _LOWEST_KEY, tl.int64)
    tl.store(sure_ptr + row, lowest_key.to(tl.int32))
    tl.store(tied_ptr + row, lowest_key.to(tl.int32))
    tl.store(limit_ptr + row, tl.full((), _NO_LIMIT, tl.int32))
    filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if (temperature == 0.0) | (filters == 0):
        return
    offsets = tl.arange(0, BLOCK)
    maxima = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for first in range(0, VOCAB_SIZE, BLOCK):
        x = scaled_logits(logits_ptr, first + offsets, temperature, VOCAB_SIZE)
        maxima = tl.maximum(maxima, x)
    highest = tl.max(maxima, axis=0)
    if highest == float("-inf"):
        return
    low = lowest_key
    if min_p > 0.0:  # p >= min_p * p_max
        floor = tl.zeros((1,), dtype=tl.float32) + (highest + tl.log(min_p)) + 0.0
        low = tl.maximum(low, tl.max(order_key(floor), axis=0).to(tl.int64))
    peak = tl.zeros((1,), dtype=tl.float32) + highest
    high = tl.max(order_key(peak), axis=0).to(tl.int64) + 1
    low = tl.minimum(low, high - 1)
    count, _n1, _n2, mass, _m1, _m2 = _measure(
        logits_ptr, temperature, highest, low, high, high, VOCAB_SIZE, BLOCK
    )
    if (top_k > 0) & (top_k < count):
        low, _k_high, _k_tied, count, mass, _k_mass = _search(
            logits_ptr, temperature, highest, low, high, count, mass, top_k, 0.0, VOCAB_SIZE, BLOCK
        )
    sure = low
    limit = tl.full((), _NO_LIMIT, tl.int32)
    if top_p < 1.0:
        # At least one: the most likely alone has a mass of one.
        target = tl.maximum(top_p * mass, 1e-30)
        low, sure, num_tied, _count, mass, sure_mass = _search(
            logits_ptr, temperature, highest, low, high, count, mass, 1, target, VOCAB_SIZE, BLOCK
        )
        if num_tied > 1:
            each = (mass - sure_mass) / num_tied
            num_kept = tl.ceil((target - sure_mass) / each).to(tl.int32)
            num_kept = tl.minimum(tl.maximum(num_kept, 1), num_tied)
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
