"""lm_head_sample: logits of few rows and the draw from them, without storing the logits.

A program computes the logits of one tile of the vocabulary as `skinny_kernels` do, rounds them as a
stored product would be, applies temperature and Gumbel noise, and stores the best of each row; the
best tile is taken by the kernel that `sampling` has for that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.gpu.device import num_multiprocessors
from nbllm_kernels.gpu.gumbel import gumbel_noise, noise_keys
from nbllm_kernels.gpu.programmatic_launch import launch_options
from nbllm_kernels.gpu.sampling import combine_kernel
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


@triton.jit
def _noise(
    ids: tl.tensor,  # [BLOCK_N]
    row: tl.tensor,  # [R]
    num_rows: tl.tensor,
    temperature_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
) -> tl.tensor:
    """What is added to the scaled logits, [BLOCK_N, R], and their divisors, [1, R].

    It depends on no logit, so it is computed while the weight is on its way.
    """
    exists = row < num_rows
    temperature = tl.load(temperature_ptr + row, mask=exists, other=0.0)[None, :]
    seed = tl.load(seeds_ptr + row, mask=exists, other=0)
    position = tl.load(positions_ptr + row, mask=exists, other=0)
    key_0, key_1 = noise_keys(seed, position)
    tile_ids = ids[:, None] + tl.zeros_like(row)[None, :]
    noise = gumbel_noise(tile_ids, key_0[None, :], key_1[None, :])
    is_greedy = temperature == 0.0
    return tl.where(is_greedy, 0.0, noise), tl.where(is_greedy, 1.0, temperature)


@triton.jit
def _store_best(
    logits: tl.tensor,  # [BLOCK_N, R] float32, rounded to the model's dtype
    noise: tl.tensor,  # [BLOCK_N, R]
    divisor: tl.tensor,  # [1, R]
    ids: tl.tensor,  # [BLOCK_N]
    row: tl.tensor,  # [R]
    num_rows: tl.tensor,
    value_ptr: tl.tensor,
    id_ptr: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
) -> None:
    """The best of a tile and its id, for each row; the arithmetic is that of `sample`."""
    is_token = (ids < VOCAB_SIZE)[:, None]
    # Neither NaN nor infinity is below infinity.
    is_bad = tl.max((is_token & ~(logits < float("inf"))).to(tl.int32), axis=0) != 0
    value = (tl.div_rn(logits, tl.zeros_like(logits) + divisor) + 0.0) + noise
    value = tl.where(is_token & (value == value), value, float("-inf"))
    best = tl.argmax(value, axis=0, tie_break_left=True)
    highest = tl.where(is_bad, float("inf"), tl.max(value, axis=0))
    output = row * tl.num_programs(0) + tl.program_id(0)
    exists = row < num_rows
    tl.store(value_ptr + output, highest, mask=exists)
    tl.store(id_ptr + output, tl.program_id(0) * ids.shape[0] + best, mask=exists)


@triton.jit
def lm_head_gemv_kernel(
    x_ptr: tl.tensor,  # [1, IN_FEATURES]
    weight_ptr: tl.tensor,  # [VOCAB_SIZE, IN_FEATURES]
    temperature_ptr: tl.tensor,  # [num_rows] float32
    seeds_ptr: tl.tensor,  # [num_rows] int64
    positions_ptr: tl.tensor,  # [num_rows] int64
    value_ptr: tl.tensor,  # [num_rows, num_tiles] float32: the best of each tile
    id_ptr: tl.tensor,  # [num_rows, num_tiles] int32: its id
    stride_weight_row: tl.tensor,
    IN_FEATURES: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    ids = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = (ids < VOCAB_SIZE)[:, None, None]
    weight_row_ptr = weight_ptr + (ids.to(tl.int64) * stride_weight_row)[:, None, None]
    w = load_tile(weight_row_ptr, row_mask, 0, IN_FEATURES, CHUNKS, BLOCK_K)
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, 1)
    noise, divisor = _noise(ids, row, 1, temperature_ptr, seeds_ptr, positions_ptr)
    x = load_vector(x_ptr, IN_FEATURES, 0, CHUNKS, BLOCK_K)
    acc = tl.sum(w.to(tl.float32) * x[None, :, :], axis=1)
    for group in range(1, NUM_GROUPS):
        w = load_tile(weight_row_ptr, row_mask, group, IN_FEATURES, CHUNKS, BLOCK_K)
        x = load_vector(x_ptr, IN_FEATURES, group, CHUNKS, BLOCK_K)
        acc += tl.sum(w.to(tl.float32) * x[None, :, :], axis=1)
    logits = tl.sum(acc, axis=1).to(x_ptr.dtype.element_ty).to(tl.float32)
    _store_best(logits[:, None], noise, divisor, ids, row, 1, value_ptr, id_ptr, VOCAB_SIZE)


@triton.jit(do_not_specialize=["num_rows"])
def lm_head_matmul_kernel(
    x_ptr: tl.tensor,  # [num_rows, IN_FEATURES]; the rest as in lm_head_gemv_kernel
    weight_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    value_ptr: tl.tensor,
    id_ptr: tl.tensor,
    num_rows: tl.tensor,  # at most BLOCK_M
    stride_x_row: tl.tensor,
    stride_weight_row: tl.tensor,
    IN_FEATURES: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    noise, divisor = _noise(ids, row, num_rows, temperature_ptr, seeds_ptr, positions_ptr)
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
    logits = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
    _store_best(logits, noise, divisor, ids, row, num_rows, value_ptr, id_ptr, VOCAB_SIZE)


def lm_head_sample(hidden: Tensor, weight: Tensor, params: SamplingTensors) -> Tensor:
    """See `nbllm_kernels.lm_head_sample`; for at most sixteen rows and no filters.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    check_product(hidden, weight)
    require(params.all_greedy or not params.any_filter, lambda: "filters need all logits")
    (num_rows, in_features), vocab_size = hidden.shape, weight.shape[0]
    device = hidden.device
    temperature = params.temperature.contiguous()  # the engine passes a column of a table
    require_index("temperature", temperature, (num_rows,), torch.float32, device)
    require_index("seeds", params.seeds, (num_rows,), torch.int64, device)
    require_index("positions", params.positions, (num_rows,), torch.int64, device)
    shape = head_shape(num_rows, vocab_size, in_features, num_multiprocessors(device))
    num_tiles = triton.cdiv(vocab_size, shape.block_n)
    values = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    ids = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    arguments = (hidden, weight, temperature, params.seeds, params.positions, values, ids)
    options: dict[str, Any] = {
        "IN_FEATURES": in_features,
        "VOCAB_SIZE": vocab_size,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "num_warps": shape.num_warps,
        **launch_options(device),
    }
    if isinstance(shape, GemvShape):
        num_groups = triton.cdiv(in_features, shape.chunks * shape.block_k)
        lm_head_gemv_kernel[(num_tiles,)](
            *arguments,
            weight.stride(0),
            CHUNKS=shape.chunks,
            NUM_GROUPS=num_groups,
            maxnreg=shape.max_registers,
            **options,
        )
    else:
        lm_head_matmul_kernel[(num_tiles,)](
            *arguments,
            num_rows,
            hidden.stride(0),
            weight.stride(0),
            BLOCK_M=MAX_ROWS,
            num_stages=shape.num_stages,
            **options,
        )
    combine_kernel[(num_rows,)](
        values,
        ids,
        tokens,
        NUM_TILES=num_tiles,
        PADDED_TILES=triton.next_power_of_2(num_tiles),
        num_warps=16 if num_tiles > 4096 else 4,
        **launch_options(device),
    )
    return tokens


def head_shape(
    num_rows: int, vocab_size: int, in_features: int, num_multiprocessors: int
) -> LaunchShape:
    """That of the plain product, so that logits are the same; of a vocabulary so small that its
    product would be sliced, a shape without slices."""
    shape = launch_shape(num_rows, vocab_size, in_features, num_multiprocessors)
    if isinstance(shape, MatmulShape) and shape.slices > 1:
        return MatmulShape(32, 128, 1, 4, 4, prefetch_lines=0)
    return shape
