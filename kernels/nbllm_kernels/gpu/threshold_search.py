"""What min_p, top_k and top_p leave of a row, without sorting it.

By repeated four-way search over the order of the floats the smallest logit is found that is kept,
and how many of those that equal it. Nearly always it is among the few thousand largest: these
`shortlist_kernel` collects, and searches in registers. Rows of which it is not sure that the border
is among them are left to `threshold_kernel`, which reads the whole row for every step of the
search.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels.gpu.scaled_logits import order_key, scaled_logits

LOWEST_KEY = tl.constexpr(-0x7F800000)  # of the lowest finite float; -inf is just below
NO_LIMIT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def measure(
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
def _measure_listed(
    keys: tl.tensor,  # [CAPACITY] int32
    masses: tl.tensor,  # [CAPACITY] float32, of keys that are listed; else 0
    k0: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
) -> tl.tensor:
    """The same of a list; keys that are not listed are below all others."""
    at_0, at_1, at_2 = keys >= k0, keys >= k1, keys >= k2
    return (
        tl.sum(at_0.to(tl.int32), axis=0),
        tl.sum(at_1.to(tl.int32), axis=0),
        tl.sum(at_2.to(tl.int32), axis=0),
        tl.sum(tl.where(at_0, masses, 0.0), axis=0),
        tl.sum(tl.where(at_1, masses, 0.0), axis=0),
        tl.sum(tl.where(at_2, masses, 0.0), axis=0),
    )


@triton.jit
def _search(
    logits_ptr: tl.tensor,
    temperature: tl.tensor,
    highest: tl.tensor,
    keys: tl.tensor,
    masses: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    low_count: tl.tensor,
    low_mass: tl.tensor,
    min_count: tl.tensor,
    min_mass: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_LISTED: tl.constexpr,  # keys and masses are the row's; else they are not used
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
        if IS_LISTED:
            n0, n1, n2, m0, m1, m2 = _measure_listed(keys, masses, k0, k1, k2)
        else:
            n0, n1, n2, m0, m1, m2 = measure(
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
def find_highest(
    logits_ptr: tl.tensor, temperature: tl.tensor, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    offsets = tl.arange(0, BLOCK)
    maxima = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for first in range(0, VOCAB_SIZE, BLOCK):
        x = scaled_logits(logits_ptr, first + offsets, temperature, VOCAB_SIZE)
        maxima = tl.maximum(maxima, x)
    return tl.max(maxima, axis=0)


@triton.jit
def key_range(highest: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """The keys that min_p leaves: from the first on, below the second. int64."""
    low = tl.full((), LOWEST_KEY, tl.int64)
    if min_p > 0.0:  # p >= min_p * p_max
        floor = tl.zeros((1,), dtype=tl.float32) + (highest + tl.log(min_p)) + 0.0
        low = tl.maximum(low, tl.max(order_key(floor), axis=0).to(tl.int64))
    peak = tl.zeros((1,), dtype=tl.float32) + highest
    high = tl.max(order_key(peak), axis=0).to(tl.int64) + 1
    return tl.minimum(low, high - 1), high


@triton.jit
def find_border(
    logits_ptr: tl.tensor,
    temperature: tl.tensor,
    highest: tl.tensor,
    keys: tl.tensor,
    masses: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    count: tl.tensor,  # of the logits from `low` on, and their mass
    mass: tl.tensor,
    total_count: tl.tensor,  # of those that min_p leaves, which may be more than are listed
    total_mass: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_LISTED: tl.constexpr,  # as in `_search`
) -> tl.tensor:
    """What top_k and then top_p leave: keys from `sure` on, and the first num_kept of those from
    low to there, all of them if it is 0. The border lies at `low` or above."""
    if (top_k > 0) & (top_k < total_count):
        low, _k_high, _k_tied, count, mass, _k_mass = _search(
            logits_ptr,
            temperature,
            highest,
            keys,
            masses,
            low,
            high,
            count,
            mass,
            top_k,
            0.0,
            VOCAB_SIZE,
            BLOCK,
            IS_LISTED,
        )
        total_mass = mass
    sure = low
    num_kept = tl.full((), 0, tl.int32)
    if top_p < 1.0:
        # At least one: the most likely alone has a mass of one.
        target = tl.maximum(top_p * total_mass, 1e-30)
        low, sure, num_tied, _count, mass, sure_mass = _search(
            logits_ptr,
            temperature,
            highest,
            keys,
            masses,
            low,
            high,
            count,
            mass,
            1,
            target,
            VOCAB_SIZE,
            BLOCK,
            IS_LISTED,
        )
        if num_tied > 1:
            each = (mass - sure_mass) / num_tied
            num_kept = tl.ceil((target - sure_mass) / each).to(tl.int32)
            num_kept = tl.minimum(tl.maximum(num_kept, 1), num_tied)
    return low, sure, num_kept
