"""matmul_batch_invariant: x W^T + b where a row's result depends on that row alone.

Every row of every batch goes through tiles of one size, and the inner dimension is summed from
front to back in steps of one size by one program: no split of the sum, no choice by shape of the
batch. A row's products do not depend on its place in the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.validation import describe, require, require_float, require_like


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr: tl.tensor,  # [num_rows, in_features]
    weight_ptr: tl.tensor,  # [out_features, in_features]
    bias_ptr: tl.tensor,  # [out_features]
    out_ptr: tl.tensor,  # [num_rows, out_features]
    num_rows: tl.tensor,
    stride_x_row: tl.tensor,
    stride_weight_row: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < num_rows, column < OUT_FEATURES
    inner = tl.arange(0, BLOCK_K)
    x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * stride_x_row
    weight_row_ptr = weight_ptr + column.to(tl.int64)[:, None] * stride_weight_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_K):
        k = start + inner[None, :]
        if IN_FEATURES % BLOCK_K == 0:
            x = tl.load(x_row_ptr + k, mask=row_mask[:, None], other=0.0)
            w = tl.load(weight_row_ptr + k, mask=column_mask[:, None], other=0.0)
        else:
            k_mask = k < IN_FEATURES
            x = tl.load(x_row_ptr + k, mask=row_mask[:, None] & k_mask, other=0.0)
            w = tl.load(weight_row_ptr + k, mask=column_mask[:, None] & k_mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        acc += bias[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * OUT_FEATURES + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)


def matmul_batch_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    Args:
        x: [num_rows, in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [num_rows, out_features].

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    require_float("x", x, 2)
    require_float("weight", weight, 2)
    require_like("weight", weight, x)
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    require(
        weight.shape[1] == in_features,
        lambda: f"x {describe(x)} and weight {describe(weight)} don't fit",
    )
    if bias is not None:
        require_like("bias", bias, x)
        require(
            bias.shape == (out_features,) and bias.is_contiguous(),
            lambda: f"bias must be contiguous [{out_features}]: {describe(bias)}",
        )
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0 or out_features == 0:
        return out
    is_float32 = x.dtype == torch.float32
    block_m, block_n, block_k = (32, 32, 32) if is_float32 else (64, 64, 64)
    grid = (triton.cdiv(out_features, block_n), triton.cdiv(num_rows, block_m))
    _matmul_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        x.stride(0),
        weight.stride(0),
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION="ieee",
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=4,
    )
    return out
