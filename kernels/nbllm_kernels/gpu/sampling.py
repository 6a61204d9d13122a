"""sample: filters by search instead of sorting, then the Gumbel draw over the whole device.

Where some row filters, three kernels. `_threshold_kernel` has one program per row: it finds, by
repeated four-way search over the order of the floats, the smallest logit that min_p, top_k and
top_p leave. `_draw_kernel` splits each row's vocabulary into tiles and takes the best of
logit / temperature + noise in each; `_combine_kernel` takes the best tile. Without noise the last
two do, and without filters those of `bounded_draw`. Equal values go to the lowest id everywhere. A
row's token depends on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.bounded_draw import bound_kernel, scaled_logits, settle_kernel
from nbllm_kernels.gpu.gumbel import gumbel_noise, noise_keys
from nbllm_kernels.gpu.validation import require, require_float, require_index
from nbllm_kernels.sampling_tensors import SamplingTensors

_BLOCK = 2048  # ids at a time
_MAX_VOCAB_SIZE = 1 << 24

_LOWEST_KEY = tl.constexpr(-0x7F800000)  # of the lowest finite float; -inf is just below
_NO_LIMIT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _order_key(x: tl.tensor) -> tl.tensor:
    """An int32 for each float32 that orders like it."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
        key = _order_key(x)
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
def _threshold_kernel(
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
        low = tl.maximum(low, tl.max(_order_key(floor), axis=0).to(tl.int64))
    peak = tl.zeros((1,), dtype=tl.float32) + highest
    high = tl.max(_order_key(peak), axis=0).to(tl.int64) + 1
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
                key = _order_key(
                    scaled_logits(logits_ptr, first + offsets, temperature, VOCAB_SIZE)
                )
                tied = ((key >= low) & (key < sure)).to(tl.int32)
                rank = seen + tl.cumsum(tied, axis=0)
                is_last = (tied > 0) & (rank == num_kept)
                here = tl.max(tl.where(is_last, first + offsets, -1), axis=0)
                limit = tl.where(here >= 0, here, limit)
                seen += tl.sum(tied, axis=0)
    tl.store(sure_ptr + row, sure.to(tl.int32))
    tl.store(tied_ptr + row, low.to(tl.int32))
    tl.store(limit_ptr + row, limit)


@triton.jit
def _draw_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    temperature_ptr: tl.tensor,  # [N] float32
    seeds_ptr: tl.tensor,  # [N] int64
    positions_ptr: tl.tensor,  # [N] int64
    sure_ptr: tl.tensor,  # [N] int32, see _threshold_kernel
    tied_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    value_ptr: tl.tensor,  # [N, num_tiles] float32: the best of each tile
    id_ptr: tl.tensor,  # [N, num_tiles] int32: its id
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    ANY_FILTER: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    logits_ptr += row * stride_row
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    if ALL_GREEDY:
        value = scaled_logits(logits_ptr, ids, 0.0, VOCAB_SIZE)
    else:
        temperature = tl.load(temperature_ptr + row)
        value = scaled_logits(logits_ptr, ids, temperature, VOCAB_SIZE)
        if temperature != 0.0:
            if ANY_FILTER:
                key = _order_key(value)
                sure, tied = tl.load(sure_ptr + row), tl.load(tied_ptr + row)
                kept = (key >= sure) | ((key >= tied) & (ids <= tl.load(limit_ptr + row)))
                value = tl.where(kept, value, float("-inf"))
            zero = tl.zeros((1,), dtype=tl.int64)
            key_0, key_1 = noise_keys(
                zero + tl.load(seeds_ptr + row), zero + tl.load(positions_ptr + row)
            )
            value += gumbel_noise(ids, key_0, key_1)
    best = tl.argmax(value, axis=0, tie_break_left=True)
    output = row * tl.num_programs(1) + tile
    raw = tl.load(logits_ptr + ids, mask=ids < VOCAB_SIZE, other=0.0).to(tl.float32)
    is_bad = tl.max(((raw != raw) | (raw == float("inf"))).to(tl.int32), axis=0) != 0
    tl.store(value_ptr + output, tl.where(is_bad, float("inf"), tl.max(value, axis=0)))
    tl.store(id_ptr + output, tile * BLOCK + best)


@triton.jit
def _combine_kernel(
    value_ptr: tl.tensor,  # [N, num_tiles] float32
    id_ptr: tl.tensor,  # [N, num_tiles] int32
    token_ptr: tl.tensor,  # [N] int64
    NUM_TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED_TILES)
    value = tl.load(value_ptr + row * NUM_TILES + tile, mask=tile < NUM_TILES, other=float("-inf"))
    # A tile past the end comes after the others, so that it never wins, not even at -inf.
    best = tl.argmax(value, axis=0, tie_break_left=True)
    token = tl.load(id_ptr + row * NUM_TILES + best).to(tl.int64)
    highest = tl.max(value, axis=0)
    is_bad = (highest == float("inf")) | (highest == float("-inf"))
    tl.store(token_ptr + row, tl.where(is_bad, -1, token))


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """See `nbllm_kernels.sample`.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    # The engine passes columns of a table.
    temperature, top_p, min_p = (
        column.contiguous() for column in (params.temperature, params.top_p, params.min_p)
    )
    num_rows, vocab_size = _check(logits, params)
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return tokens
    num_tiles = triton.cdiv(vocab_size, _BLOCK)
    if not (params.all_greedy or params.any_filter):
        _draw_by_bounds(logits, temperature, params, tokens, num_tiles)
        return tokens
    values = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    ids = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    any_filter = params.any_filter and not params.all_greedy
    sure = tied = limit = ids
    if any_filter:
        sure, tied, limit = torch.empty((3, num_rows), dtype=torch.int32, device=device)
        _threshold_kernel[(num_rows,)](
            logits,
            temperature,
            params.top_k,
            top_p,
            min_p,
            sure,
            tied,
            limit,
            logits.stride(0),
            VOCAB_SIZE=vocab_size,
            BLOCK=_BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )
    _draw_kernel[(num_rows, num_tiles)](
        logits,
        temperature,
        params.seeds,
        params.positions,
        sure,
        tied,
        limit,
        values,
        ids,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        ALL_GREEDY=params.all_greedy,
        ANY_FILTER=any_filter,
        num_warps=4,
        enable_fp_fusion=True,
    )
    _combine_kernel[(num_rows,)](
        values,
        ids,
        tokens,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return tokens


def _draw_by_bounds(
    logits: Tensor, temperature: Tensor, params: SamplingTensors, tokens: Tensor, num_tiles: int
) -> None:
    num_rows, vocab_size = logits.shape
    bounds = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits.device)
    bound_kernel[(num_rows, num_tiles)](
        logits,
        temperature,
        params.seeds,
        params.positions,
        bounds,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    settle_kernel[(num_rows,)](
        logits,
        temperature,
        params.seeds,
        params.positions,
        bounds,
        tokens,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        num_warps=4,
        enable_fp_fusion=True,
    )


def _check(logits: Tensor, params: SamplingTensors) -> tuple[int, int]:
    require_float("logits", logits, 2)
    num_rows, vocab_size = logits.shape
    require(0 < vocab_size <= _MAX_VOCAB_SIZE, lambda: f"vocab_size is {vocab_size}")
    shape, device = (num_rows,), logits.device
    if not params.all_greedy:
        require_index("seeds", params.seeds, shape, torch.int64, device)
        require_index("positions", params.positions, shape, torch.int64, device)
    for name in ("temperature", "top_p", "min_p"):
        column = getattr(params, name).contiguous()
        require_index(name, column, shape, torch.float32, device)
    require_index("top_k", params.top_k, shape, torch.int32, device)
    return num_rows, vocab_size
