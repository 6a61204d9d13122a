"""The Gumbel draw: an upper bound for every id, the exact value for a few.

Exact noise takes two logarithms, a series and a division for each id of the vocabulary. But
-log(-log(1 - w)) lies below -log(w), and close to it where it is large, which is where the draw is
decided; and the bits of a float32, read as an integer, are a logarithm that is at most 0.06 too
small (log2(m) >= m - 1 for a mantissa m). So `bound_kernel` takes the largest bound in each tile,
and `settle_kernel` computes exactly the few tiles that may hold the best value: those whose bound
is not below the best that it has found so far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels.gpu.gumbel import gumbel_noise, hash_ids, row_noise_keys
from nbllm_kernels.gpu.scaled_logits import from_order_key, order_key, scaled_logits

_LN_2 = tl.constexpr(0.6931471805599453)
_EXPONENT_BIAS = tl.constexpr(127)
_MANTISSA = tl.constexpr(2.0**-23)


@triton.jit
def _noise_bound(hashed: tl.tensor) -> tl.tensor:
    """At least the noise of each hash, but for rounding: -log(w), with w a bit smaller than it is
    in `gumbel`, by the bits of w * 2^31."""
    number = (hashed >> 1).to(tl.int32).to(tl.float32)
    log_2 = number.to(tl.int32, bitcast=True).to(tl.float32) * _MANTISSA
    return (31 + _EXPONENT_BIAS) * _LN_2 - _LN_2 * log_2


@triton.jit
def bound_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    temperature_ptr: tl.tensor,  # [N] float32
    seeds_ptr: tl.tensor,  # [N] int64
    positions_ptr: tl.tensor,  # [N] int64
    tied_ptr: tl.tensor,  # [N] int32, if HAS_FILTER: see threshold_kernel
    bound_ptr: tl.tensor,  # [N, num_tiles] float32; infinity for a tile with NaN or infinity
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_FILTER: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    mask = ids < VOCAB_SIZE
    x = tl.load(logits_ptr + row * stride_row + ids, mask=mask, other=float("-inf"))
    x = x.to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    value = x
    if temperature != 0.0:
        key_0, key_1 = row_noise_keys(seeds_ptr, positions_ptr, row)
        value = x * (1.0 / temperature)
        bound = value + _noise_bound(hash_ids(ids, key_0, key_1))
        if HAS_FILTER:  # what rounding may have put below the border stays
            border = from_order_key(tl.load(tied_ptr + row))
            border -= 1e-6 * tl.abs(border) + 1e-30
            bound = tl.where(value >= border, bound, float("-inf"))
        value = bound
    # Neither NaN nor infinity is below infinity.
    highest = tl.max(tl.where(x < float("inf"), value, float("inf")), axis=0)
    # More than what rounding can be wrong by, here and in the exact value.
    slack = 1e-4 + 1e-6 * tl.abs(highest)
    highest = tl.where(highest == float("-inf"), highest, highest + slack)
    tl.store(bound_ptr + row * tl.num_programs(1) + tile, highest)


@triton.jit
def settle_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    temperature_ptr: tl.tensor,  # [N] float32
    seeds_ptr: tl.tensor,  # [N] int64
    positions_ptr: tl.tensor,  # [N] int64
    sure_ptr: tl.tensor,  # [N] int32, if HAS_FILTER: see threshold_kernel
    tied_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    bound_ptr: tl.tensor,  # [N, NUM_TILES] float32
    token_ptr: tl.tensor,  # [N] int64; -1 for a row from which nothing can be drawn
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    HAS_FILTER: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    temperature = tl.load(temperature_ptr + row)
    key_0, key_1 = row_noise_keys(seeds_ptr, positions_ptr, row)
    tiles = tl.arange(0, PADDED_TILES)
    bounds = tl.load(
        bound_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("-inf")
    )
    open_bound = tl.max(bounds, axis=0)
    is_bad = open_bound == float("inf")
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), -1, tl.int32)
    # The best value may be in a tile whose bound is as high. No tile is open at minus infinity.
    while (open_bound >= best) & (open_bound > float("-inf")) & (not is_bad):
        tile = tl.argmax(bounds, axis=0)
        ids = tile * BLOCK + tl.arange(0, BLOCK)
        value = scaled_logits(logits_ptr, ids, temperature, VOCAB_SIZE)
        if temperature != 0.0:
            if HAS_FILTER:
                key = order_key(value)
                sure, tied = tl.load(sure_ptr + row), tl.load(tied_ptr + row)
                kept = (key >= sure) | ((key >= tied) & (ids <= tl.load(limit_ptr + row)))
                value = tl.where(kept, value, float("-inf"))
            value += gumbel_noise(ids, key_0, key_1)
        here = tl.max(value, axis=0)
        first = tile * BLOCK + tl.argmax(value, axis=0, tie_break_left=True)
        # Equal values go to the lowest id.
        is_better = (here > best) | ((here == best) & (first < token) & (here > float("-inf")))
        best = tl.where(is_better, here, best)
        token = tl.where(is_better, first, token)
        bounds = tl.where(tiles == tile, float("-inf"), bounds)
        open_bound = tl.max(bounds, axis=0)
    tl.store(token_ptr + row, token.to(tl.int64))
