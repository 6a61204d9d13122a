"""skinny_linear: products for up to sixteen rows, with what stands before and after them.

One launch computes epilogue(norm(x) W^T + b). The kernels and their reasons are in
`skinny_kernels`; launch sizes come from the table here, keyed by the shape of the weight, the
number of rows and the number of multiprocessors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
import triton
from torch import Tensor

from nbllm_kernels.gpu.device import num_multiprocessors
from nbllm_kernels.gpu.programmatic_launch import launch_options
from nbllm_kernels.gpu.skinny_kernels import gemv_kernel, skinny_matmul_kernel
from nbllm_kernels.gpu.validation import describe, require, require_float, require_like

Activation = Literal["none", "silu", "gelu", "gelu_tanh"]

MAX_ROWS = 16  # from there on cuBLAS is as fast, and its caller launches norms and activations
_GEMV_TILE_BYTES = 65_536  # half of the registers: the next kernel's tile fits beside it
_MANY_ROWS = 512  # for each multiprocessor: programs are many, whatever their size
_LINE_BYTES = 128


@dataclass(frozen=True, slots=True)
class GemvShape:
    """Launch sizes of `gemv_kernel`."""

    block_n: int
    block_k: int
    chunks: int
    num_warps: int
    max_registers: int | None = None  # of a thread


@dataclass(frozen=True, slots=True)
class MatmulShape:
    """Launch sizes of `skinny_matmul_kernel`."""

    block_n: int
    block_k: int
    slices: int
    num_warps: int
    num_stages: int
    prefetch_lines: int


LaunchShape = Union[GemvShape, MatmulShape]


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm of x: weight [in_features], and the rest as in `nbllm_kernels.rms_norm`."""

    weight: Tensor
    eps: float
    weight_offset: float = 0.0


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """True where `skinny_linear` serves this product, and serves it faster than cuBLAS."""
    return (
        x.ndim == 2
        and 0 < x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.dtype == x.dtype
        and weight.stride(-1) == 1
        and x.stride(-1) == 1
    )


@functools.cache
def launch_shape(
    num_rows: int,
    out_features: int,
    in_features: int,
    num_multiprocessors: int,
    *,
    has_norm: bool = False,
) -> LaunchShape:
    """The fixed table, for weights of two bytes a number.

    Measured on an H200 with the shapes of Qwen3-0.6B, Llama-3.2-1B and Llama-3.1-8B; what counts
    of a card is how many rows of the weight each of its multiprocessors has.
    """
    rows_per_multiprocessor = out_features / num_multiprocessors
    if num_rows == 1:
        return _gemv_shape(rows_per_multiprocessor, in_features, has_norm)
    # Few programs: the inner dimension is divided among the warps, or its steps take too long.
    if rows_per_multiprocessor <= 16:
        return MatmulShape(16, 128, 4, 4, 5, prefetch_lines=16)
    if rows_per_multiprocessor <= 64:
        if in_features < 2048:
            return MatmulShape(32, 64, 4, 4, 5, prefetch_lines=16)
        if rows_per_multiprocessor <= 32:
            return MatmulShape(32, 256, 1, 4, 7 if in_features >= 4096 else 4, prefetch_lines=16)
        return MatmulShape(64, 256, 1, 4, 4, prefetch_lines=8)
    if rows_per_multiprocessor <= 128:
        return MatmulShape(128, 128, 1, 8, 5, prefetch_lines=8)
    if rows_per_multiprocessor <= _MANY_ROWS:
        return MatmulShape(64, 128, 1, 8, 5, prefetch_lines=8)
    return MatmulShape(64, 128, 1, 4, 5, prefetch_lines=8)


def _gemv_shape(rows_per_multiprocessor: float, in_features: int, has_norm: bool) -> GemvShape:
    """The whole inner dimension, and one or two programs per multiprocessor, if that fits.

    Of a longer one smaller tiles: each warp holds x, and the norm's weight, for its rows.
    """
    if has_norm and 512 < in_features <= 1024:
        return GemvShape(16, 1024, 1, 8 if rows_per_multiprocessor <= 32 else 4)
    if in_features <= 1024 or (in_features <= 4096 and rows_per_multiprocessor <= 16):
        block_k = min(256, max(16, triton.next_power_of_2(in_features)))
        chunks = triton.next_power_of_2(triton.cdiv(in_features, block_k))
        row_bytes = 2 * block_k * chunks
        block_n = triton.next_power_of_2(math.ceil(rows_per_multiprocessor))
        if rows_per_multiprocessor > _MANY_ROWS:
            block_n = 16
        block_n = max(4, min(block_n, _GEMV_TILE_BYTES // row_bytes, 64))
        num_warps = 8 if 2 * block_n * row_bytes > _GEMV_TILE_BYTES else 4
        return GemvShape(block_n, block_k, chunks, num_warps)
    if has_norm:
        return GemvShape(8, 1024, 2, 4) if in_features <= 2048 else GemvShape(4, 1024, 4, 4)
    return GemvShape(8, 256, 4, 8) if in_features <= 4096 else GemvShape(4, 512, 4, 8)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    shape: LaunchShape | None = None,
) -> Tensor:
    """residual + norm(x) W^T + b, or act(gate) * up of it.

    Args:
        x: [num_rows, in_features], at most sixteen rows.
        weight: [out_features, in_features]; with an activation, rows of the gate, then of up.
        bias: [out_features] or None.
        norm: of x, or None.
        residual: [num_rows, out_features], overwritten and returned; not with an activation.
        activation: of the gate.
        shape: launch sizes other than the table's, to measure them.

    Returns:
        [num_rows, out_features], or half as wide with an activation.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    check_product(x, weight, bias, norm, residual, activation)
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    width = out_features if activation == "none" else out_features // 2
    out = residual
    if out is None:
        out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if shape is None:
        count = num_multiprocessors(x.device)
        shape = launch_shape(num_rows, out_features, in_features, count, has_norm=norm is not None)
    arguments = (
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm.weight,
        out,
        num_rows,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
    )
    options: dict[str, Any] = {
        "IN_FEATURES": in_features,
        "OUT_FEATURES": out_features,
        "HAS_NORM": norm is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation,
        "TRIGGER_EARLY": norm is None or activation != "none",
        **launch_options(x.device),
    }
    grid = (triton.cdiv(out_features, shape.block_n),)
    if isinstance(shape, GemvShape):
        _launch_gemv(grid, arguments, options, shape)
    else:
        _launch_matmul(grid, arguments, options, shape)
    return out


def _launch_gemv(
    grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any], shape: GemvShape
) -> None:
    num_groups = triton.cdiv(options["IN_FEATURES"], shape.block_k * shape.chunks)
    gemv_kernel[grid](
        *arguments,
        **options,
        ROWS=triton.next_power_of_2(arguments[0].shape[0]),
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        CHUNKS=shape.chunks,
        NUM_GROUPS=num_groups,
        num_warps=shape.num_warps,
        maxnreg=shape.max_registers,
    )


def _launch_matmul(
    grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any], shape: MatmulShape
) -> None:
    x = arguments[0]
    lines = triton.cdiv(options["IN_FEATURES"] * x.element_size(), _LINE_BYTES)
    skinny_matmul_kernel[grid](
        *arguments,
        **options,
        BLOCK_M=MAX_ROWS,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        SLICES=shape.slices,
        PREFETCH_LINES=min(shape.prefetch_lines, triton.next_power_of_2(lines)),
        NORM_FACTOR=2.0**-6 if x.dtype == torch.float16 else 1.0,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def check_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> None:
    """Raise ValueError unless these are arguments of `skinny_linear`."""
    require_float("x", x, 2)
    require_float("weight", weight, 2)
    require_like("weight", weight, x)
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    require(x.element_size() == 2, lambda: f"x must be float16 or bfloat16: {x.dtype}")
    require(
        weight.shape[1] == in_features and 0 < num_rows <= MAX_ROWS,
        lambda: f"x {describe(x)} and weight {describe(weight)} don't fit",
    )
    vectors = [("bias", bias, out_features)]
    if norm is not None:
        vectors.append(("norm weight", norm.weight, in_features))
    for name, vector, size in vectors:
        if vector is not None:
            _check_vector(name, vector, size, x)
    if residual is not None:
        require_like("residual", residual, x)
        fits = residual.shape == (num_rows, out_features) and residual.stride(-1) == 1
        require(fits, lambda: f"residual must be {[num_rows, out_features]}: {describe(residual)}")
    if activation != "none":
        require(residual is None, lambda: "a gated activation does not go with a residual")
        require(out_features % 2 == 0, lambda: f"gate and up of {out_features} rows")


def _check_vector(name: str, vector: Tensor, size: int, like: Tensor) -> None:
    require_like(name, vector, like)
    fits = vector.shape == (size,) and vector.is_contiguous()
    require(fits, lambda: f"{name} must be contiguous [{size}]: {describe(vector)}")
