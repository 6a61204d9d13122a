"""sample: filters by search instead of sorting, then the draw over the whole device.

Where some row filters, the smallest logit is found that min_p, top_k and top_p leave, see
`threshold_search`. Then the kernels of `bounded_draw` draw. Without noise `_best_kernel` splits
each row's vocabulary into tiles and takes the best of each; `combine_kernel` takes the best tile.
Equal values go to the lowest id everywhere. A row's token depends on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from nbllm_kernels.gpu.bounded_draw import bound_kernel, settle_kernel
from nbllm_kernels.gpu.scaled_logits import scaled_logits
from nbllm_kernels.gpu.shortlist_kernel import shortlist_kernel
from nbllm_kernels.gpu.threshold_kernel import threshold_kernel
from nbllm_kernels.gpu.validation import require, require_float, require_index
from nbllm_kernels.sampling_tensors import SamplingTensors

_BLOCK = 2048  # ids at a time
_CAPACITY = 4096  # most likely ids among which a border is searched for first
_MAX_VOCAB_SIZE = 1 << 24


@triton.jit
def _best_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    value_ptr: tl.tensor,  # [N, num_tiles] float32: the best of each tile
    id_ptr: tl.tensor,  # [N, num_tiles] int32: its id
    stride_row: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    logits_ptr += row * stride_row
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    value = scaled_logits(logits_ptr, ids, 0.0, VOCAB_SIZE)
    best = tl.argmax(value, axis=0, tie_break_left=True)
    output = row * tl.num_programs(1) + tile
    raw = tl.load(logits_ptr + ids, mask=ids < VOCAB_SIZE, other=0.0).to(tl.float32)
    is_bad = tl.max(((raw != raw) | (raw == float("inf"))).to(tl.int32), axis=0) != 0
    tl.store(value_ptr + output, tl.where(is_bad, float("inf"), tl.max(value, axis=0)))
    tl.store(id_ptr + output, tile * BLOCK + best)


@triton.jit
def combine_kernel(
    value_ptr: tl.tensor,  # [N, num_tiles] float32
    id_ptr: tl.tensor,  # [N, num_tiles] int32
    token_ptr: tl.tensor,  # [N] int64
    NUM_TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    """The best tile's id of each row; `value_ptr` holds plus infinity for a tile that is bad."""
    if LAUNCH_PDL:
        gdc_wait()
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
    num_rows, vocab_size = _check(logits, params)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    num_tiles = triton.cdiv(vocab_size, _BLOCK)
    if params.all_greedy:
        _take_best(logits, tokens, num_tiles)
    else:
        _draw(logits, params, tokens, num_tiles)
    return tokens


def _take_best(logits: Tensor, tokens: Tensor, num_tiles: int) -> None:
    num_rows, vocab_size = logits.shape
    values = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=logits.device)
    _best_kernel[(num_rows, num_tiles)](
        logits,
        values,
        ids,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    combine_kernel[(num_rows,)](
        values,
        ids,
        tokens,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        num_warps=1,
        LAUNCH_PDL=False,
        enable_fp_fusion=True,
    )


def _draw(logits: Tensor, params: SamplingTensors, tokens: Tensor, num_tiles: int) -> None:
    num_rows, vocab_size = logits.shape
    temperature = params.temperature.contiguous()  # the engine passes columns of a table
    bounds = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits.device)
    sure = tied = limit = tokens
    if params.any_filter:
        sure, tied, limit = _find_thresholds(logits, temperature, params)
    bound_kernel[(num_rows, num_tiles)](
        logits,
        temperature,
        params.seeds,
        params.positions,
        tied,
        bounds,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        HAS_FILTER=params.any_filter,
        num_warps=4,
        enable_fp_fusion=True,
    )
    settle_kernel[(num_rows,)](
        logits,
        temperature,
        params.seeds,
        params.positions,
        sure,
        tied,
        limit,
        bounds,
        tokens,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        HAS_FILTER=params.any_filter,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _find_thresholds(
    logits: Tensor, temperature: Tensor, params: SamplingTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """`sure`, `tied` and `limit` of `threshold_kernel`, for each row."""
    num_rows, vocab_size = logits.shape
    device = logits.device
    # Each on its own: rows of one tensor may be aligned or not, and the kernels compiled twice.
    sure, tied, limit, is_left = (
        torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(4)
    )
    values = torch.empty((num_rows, _CAPACITY), dtype=torch.float32, device=device)
    ids = torch.empty((num_rows, _CAPACITY), dtype=torch.int32, device=device)
    top_p, min_p = params.top_p.contiguous(), params.min_p.contiguous()
    shortlist_kernel[(num_rows,)](
        logits,
        temperature,
        params.top_k,
        top_p,
        min_p,
        sure,
        tied,
        limit,
        is_left,
        values,
        ids,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        CAPACITY=_CAPACITY,
        num_warps=16,
        enable_fp_fusion=True,
    )
    threshold_kernel[(num_rows,)](
        logits,
        temperature,
        params.top_k,
        top_p,
        min_p,
        sure,
        tied,
        limit,
        is_left,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return sure, tied, limit


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
