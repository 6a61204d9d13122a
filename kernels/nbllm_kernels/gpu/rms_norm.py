"""rms_norm: rows stay in registers; short rows (heads) go several to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.validation import describe, require, require_float, require_like

_TILE = 2048  # elements of a program, unless one row is longer
_MAX_HIDDEN = 32_768


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,  # [num_outer, num_inner, hidden_size]
    residual_ptr: tl.tensor,  # like x
    weight_ptr: tl.tensor,  # [hidden_size]
    out_ptr: tl.tensor,  # contiguous
    sum_ptr: tl.tensor,  # contiguous, x + residual
    num_rows: tl.tensor,
    stride_x_outer: tl.tensor,
    stride_residual_outer: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    NUM_INNER: tl.constexpr,
    STRIDE_X_INNER: tl.constexpr,
    STRIDE_RESIDUAL_INNER: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SCALE_IN_FLOAT32: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < HIDDEN_SIZE)
    outer, inner = row // NUM_INNER, row % NUM_INNER
    source = outer * stride_x_outer + inner * STRIDE_X_INNER + column
    x = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    target = row * HIDDEN_SIZE + column
    if HAS_RESIDUAL:
        source = outer * stride_residual_outer + inner * STRIDE_RESIDUAL_INNER + column
        x += tl.load(residual_ptr + source, mask=mask, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        tl.store(sum_ptr + target, x.to(dtype), mask=mask)
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / HIDDEN_SIZE
    normed = x * (1.0 / tl.sqrt_rn(mean_square + eps))
    weight = tl.load(weight_ptr + column, mask=column < HIDDEN_SIZE, other=0.0).to(tl.float32)
    if SCALE_IN_FLOAT32:
        out = normed * (weight + weight_offset)
    else:
        out = normed.to(dtype).to(tl.float32) * weight
    tl.store(out_ptr + target, out.to(dtype), mask=mask)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `nbllm_kernels.rms_norm`.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    require_float("x", x)
    require_like("weight", weight, x)
    hidden_size = x.shape[-1]
    require(
        weight.shape == (hidden_size,) and weight.is_contiguous(),
        lambda: f"weight must be contiguous [{hidden_size}]: {describe(weight)}",
    )
    require(0 < hidden_size <= _MAX_HIDDEN, lambda: f"rows of {hidden_size}; at most {_MAX_HIDDEN}")
    rows = _as_rows(x)
    rows_residual = rows
    if residual is not None:
        require_float("residual", residual)
        require_like("residual", residual, x)
        require(
            residual.shape == x.shape, lambda: f"residual must be {list(x.shape)}: {residual.shape}"
        )
        rows_residual = _as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = rows.shape[0] * rows.shape[1]
    block = triton.next_power_of_2(hidden_size)
    rows_per_program = max(1, _TILE // block)
    if num_rows:
        _rms_norm_kernel[(triton.cdiv(num_rows, rows_per_program),)](
            rows,
            rows_residual,
            weight,
            out,
            total,
            num_rows,
            rows.stride(0),
            rows_residual.stride(0),
            eps,
            weight_offset,
            NUM_INNER=rows.shape[1],
            STRIDE_X_INNER=rows.stride(1),
            STRIDE_RESIDUAL_INNER=rows_residual.stride(1),
            HIDDEN_SIZE=hidden_size,
            ROWS=rows_per_program,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            SCALE_IN_FLOAT32=weight_offset != 0.0,
            num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16,
            enable_fp_fusion=True,
        )
    return out if residual is None else (out, total)


def _as_rows(x: Tensor) -> Tensor:
    """[num_outer, num_inner, hidden_size], without a copy for two and three dimensions."""
    if x.ndim == 2:
        return x[:, None]
    return x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])
