"""sample: filters by search instead of sorting, then the Gumbel draw over the whole device.

Where some row filters, three kernels. `threshold_kernel` has one program per row: it finds, by
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
from nbllm_kernels.gpu.threshold_kernel import order_key, threshold_kernel
from nbllm_kernels.gpu.validation import require, require_float, require_index
from nbllm_kernels.sampling_tensors import SamplingTensors

_BLOCK = 2048  # ids at a time
_MAX_VOCAB_SIZE = 1 << 24


@triton.jit
def _draw_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    temperature_ptr: tl.tensor,  # [N] float32
    seeds_ptr: tl.tensor,  # [N] int64
    positions_ptr: tl.tensor,  # [N] int64
    sure_ptr: tl.tensor,  # [N] int32, see threshold_kernel
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
                key = order_key(value)
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
        threshold_kernel[(num_rows,)](
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
