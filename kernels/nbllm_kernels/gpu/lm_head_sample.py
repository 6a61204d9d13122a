"""lm_head_sample: logits of few rows and the draw from them, without storing the logits.

A program computes the logits of one tile of the vocabulary, rounds them as a stored product would
be, applies temperature and Gumbel noise, and stores the best of each row; a second kernel takes
the best tile. The weight is streamed as in `skinny_kernels`: through registers for up to four
rows, through the tensor cores for up to sixteen.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.gpu.activation import tanh
from nbllm_kernels.gpu.device import num_multiprocessors
from nbllm_kernels.gpu.gumbel import gumbel_noise, noise_keys
from nbllm_kernels.gpu.programmatic_launch import launch_options
from nbllm_kernels.gpu.skinny_kernels import load_tile, load_vector
from nbllm_kernels.gpu.skinny_linear import (
    MAX_ROWS,
    GemvShape,
    LaunchShape,
    MatmulShape,
    check_product,
    launch_shape,
)
from nbllm_kernels.gpu.validation import require, require_index
from nbllm_kernels.sampling_tensors import SamplingTensors

_BAD = tl.constexpr(-1)  # in place of an id: the row holds NaN or plus infinity


@triton.jit
def _store_best(
    logits: tl.tensor,  # [BLOCK_N, R] float32, rounded to the model's dtype
    row: tl.tensor,  # [R]
    num_rows: tl.tensor,
    temperature_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    value_ptr: tl.tensor,
    id_ptr: tl.tensor,
    softcap: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> None:
    """The best of a tile and its id, for each row; the arithmetic is that of `sample`."""
    tile = tl.program_id(0)
    ids = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < num_rows
    is_bad = (logits != logits) | (logits == float("inf"))
    num_bad = tl.sum(tl.where((ids < VOCAB_SIZE)[:, None], is_bad.to(tl.int32), 0), axis=0)
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    if ALL_GREEDY:
        value = logits + 0.0
    else:
        temperature = tl.load(temperature_ptr + row, mask=exists, other=0.0)[None, :]
        divisor = tl.where(temperature == 0.0, 1.0, temperature)
        value = tl.div_rn(logits, tl.zeros_like(logits) + divisor) + 0.0
        seed = tl.load(seeds_ptr + row, mask=exists, other=0)
        position = tl.load(positions_ptr + row, mask=exists, other=0)
        key_0, key_1 = noise_keys(seed, position)
        noise = gumbel_noise(
            ids[:, None] + tl.zeros_like(logits).to(tl.int32), key_0[None, :], key_1[None, :]
        )
        value = tl.where(temperature == 0.0, value, value + noise)
    value = tl.where((ids < VOCAB_SIZE)[:, None] & (value == value), value, float("-inf"))
    best = tl.argmax(value, axis=0, tie_break_left=True)
    output = row * tl.num_programs(0) + tile
    tl.store(value_ptr + output, tl.max(value, axis=0), mask=exists)
    tl.store(id_ptr + output, tl.where(num_bad > 0, _BAD, tile * BLOCK_N + best), mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def lm_head_gemv_kernel(
    x_ptr: tl.tensor,  # [num_rows, IN_FEATURES]
    weight_ptr: tl.tensor,  # [VOCAB_SIZE, IN_FEATURES]
    temperature_ptr: tl.tensor,  # [num_rows] float32
    seeds_ptr: tl.tensor,  # [num_rows] int64
    positions_ptr: tl.tensor,  # [num_rows] int64
    value_ptr: tl.tensor,  # [num_rows, num_tiles] float32: the best of each tile
    id_ptr: tl.tensor,  # [num_rows, num_tiles] int32: its id, or -1
    num_rows: tl.tensor,  # at most ROWS
    stride_x_row: tl.tensor,
    stride_weight_row: tl.tensor,
    softcap: tl.tensor,
    IN_FEATURES: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # one, unless NUM_GROUPS is one
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    ids = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = (ids < VOCAB_SIZE)[:, None, None]
    weight_row_ptr = weight_ptr + (ids.to(tl.int64) * stride_weight_row)[:, None, None]
    w = load_tile(weight_row_ptr, row_mask, 0, IN_FEATURES, CHUNKS, BLOCK_K)
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in tl.static_range(ROWS):
        x_size = tl.where(i < num_rows, IN_FEATURES, 0)
        x_row_ptr = x_ptr + i * stride_x_row
        x = load_vector(x_row_ptr, x_size, 0, CHUNKS, BLOCK_K)
        acc = tl.sum(w.to(tl.float32) * x[None, :, :], axis=1)
        for group in range(1, NUM_GROUPS):
            w = load_tile(weight_row_ptr, row_mask, group, IN_FEATURES, CHUNKS, BLOCK_K)
            x = load_vector(x_row_ptr, x_size, group, CHUNKS, BLOCK_K)
            acc += tl.sum(w.to(tl.float32) * x[None, :, :], axis=1)
        logits = tl.sum(acc, axis=1).to(x_ptr.dtype.element_ty).to(tl.float32)
        _store_best(
            logits[:, None],
            i + tl.arange(0, 1),
            num_rows,
            temperature_ptr,
            seeds_ptr,
            positions_ptr,
            value_ptr,
            id_ptr,
            softcap,
            VOCAB_SIZE,
            BLOCK_N,
            ALL_GREEDY,
            HAS_SOFTCAP,
        )


@triton.jit(do_not_specialize=["num_rows"])
def lm_head_matmul_kernel(
    x_ptr: tl.tensor,  # as in lm_head_gemv_kernel
    weight_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    value_ptr: tl.tensor,
    id_ptr: tl.tensor,
    num_rows: tl.tensor,  # at most BLOCK_M
    stride_x_row: tl.tensor,
    stride_weight_row: tl.tensor,
    softcap: tl.tensor,
    IN_FEATURES: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)[None, :]
    weight_row = tl.where(ids < VOCAB_SIZE, ids, 0).to(tl.int64)
    weight_row_ptr = weight_ptr + weight_row[:, None] * stride_weight_row
    x_row_ptr = x_ptr + tl.where(row < num_rows, row, 0)[:, None] * stride_x_row
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_K):
        k = start + inner
        if IN_FEATURES % BLOCK_K == 0:
            w = tl.load(weight_row_ptr + k)
            x = tl.load(x_row_ptr + k)
        else:
            w = tl.load(weight_row_ptr + k, mask=k < IN_FEATURES, other=0.0)
            x = tl.load(x_row_ptr + k, mask=k < IN_FEATURES, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    _store_best(
        acc.to(x_ptr.dtype.element_ty).to(tl.float32),
        row,
        num_rows,
        temperature_ptr,
        seeds_ptr,
        positions_ptr,
        value_ptr,
        id_ptr,
        softcap,
        VOCAB_SIZE,
        BLOCK_N,
        ALL_GREEDY,
        HAS_SOFTCAP,
    )


@triton.jit
def _combine_kernel(
    value_ptr: tl.tensor,  # [N, NUM_TILES] float32
    id_ptr: tl.tensor,  # [N, NUM_TILES] int32
    token_ptr: tl.tensor,  # [N] int64
    NUM_TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0).to(tl.int64) * NUM_TILES
    tile = tl.arange(0, PADDED_TILES)
    mask = tile < NUM_TILES
    value = tl.load(value_ptr + first + tile, mask=mask, other=float("-inf"))
    ids = tl.load(id_ptr + first + tile, mask=mask, other=0)
    # A tile past the end comes after the others, so that it never wins, not even at -inf.
    best = tl.argmax(value, axis=0, tie_break_left=True)
    token = tl.max(tl.where(tile == best, ids, _BAD), axis=0)
    token = tl.where(tl.min(ids, axis=0) < 0, _BAD, token)
    tl.store(token_ptr + tl.program_id(0), token.to(tl.int64))


def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    params: SamplingTensors,
    *,
    softcap: float | None = None,
    shape: LaunchShape | None = None,
) -> Tensor:
    """See `nbllm_kernels.lm_head_sample`; for at most sixteen rows and no filters.

    Args:
        shape: launch sizes other than the table's, to measure them.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    check_product(hidden, weight, None, None, None, "none")
    require(params.all_greedy or not params.any_filter, lambda: "rows with filters need all logits")
    (num_rows, in_features), vocab_size = hidden.shape, weight.shape[0]
    device = hidden.device
    temperature = params.temperature.contiguous()  # the engine passes a column of a table
    if not params.all_greedy:
        require_index("temperature", temperature, (num_rows,), torch.float32, device)
        require_index("seeds", params.seeds, (num_rows,), torch.int64, device)
        require_index("positions", params.positions, (num_rows,), torch.int64, device)
    if shape is None:
        shape = head_shape(num_rows, vocab_size, in_features, num_multiprocessors(device))
    num_tiles = triton.cdiv(vocab_size, shape.block_n)
    values = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    ids = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    options: dict[str, Any] = {
        "IN_FEATURES": in_features,
        "VOCAB_SIZE": vocab_size,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "ALL_GREEDY": params.all_greedy,
        "HAS_SOFTCAP": softcap is not None,
        "num_warps": shape.num_warps,
        "enable_fp_fusion": True,
        **launch_options(device),
    }
    if isinstance(shape, GemvShape):
        kernel = lm_head_gemv_kernel
        options |= {"ROWS": triton.next_power_of_2(num_rows), "CHUNKS": shape.chunks}
        options["NUM_GROUPS"] = triton.cdiv(in_features, shape.chunks * shape.block_k)
    else:
        kernel = lm_head_matmul_kernel
        options |= {"BLOCK_M": MAX_ROWS, "num_stages": shape.num_stages}
    kernel[(num_tiles,)](
        hidden,
        weight,
        temperature,
        params.seeds,
        params.positions,
        values,
        ids,
        num_rows,
        hidden.stride(0),
        weight.stride(0),
        1.0 if softcap is None else softcap,
        **options,
    )
    _combine_kernel[(num_rows,)](
        values,
        ids,
        tokens,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        num_warps=8,
        **launch_options(device),
    )
    return tokens


def head_shape(
    num_rows: int, vocab_size: int, in_features: int, num_multiprocessors: int
) -> LaunchShape:
    """The fixed table: that of the products, in whose matrix kernel nothing is sliced here."""
    shape = launch_shape(num_rows, vocab_size, in_features, num_multiprocessors)
    if isinstance(shape, GemvShape):
        return shape
    return MatmulShape(64, 128, 1, 4, 5, prefetch_lines=0)
