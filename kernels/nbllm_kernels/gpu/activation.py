"""silu_and_mul, gelu_and_mul: the same kernel with three activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.validation import describe, require, require_float

_BLOCK = 1024


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent to an absolute error of 1e-7, without overflow."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """silu, gelu or gelu_tanh of a block of float32."""
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # 0.5 * (1 + tanh(y)) is the sigmoid of 2 y, which does not cancel for y < 0.
        activated = gate / (1.0 + tl.exp(-2.0 * inner))
    return activated


@triton.jit
def _act_and_mul_kernel(
    x_ptr: tl.tensor,  # [num_rows, 2 * size]
    out_ptr: tl.tensor,  # [num_rows, size], contiguous
    stride_x_row: tl.tensor,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    dtype = out_ptr.dtype.element_ty
    source = x_ptr + row * stride_x_row + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=mask, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION)
    # Rounded before the product, as two operators of PyTorch would.
    out = activated.to(dtype).to(tl.float32) * up
    tl.store(out_ptr + row * SIZE + column, out.to(dtype), mask=mask)


def silu_and_mul(x: Tensor) -> Tensor:
    """See `nbllm_kernels.silu_and_mul`."""
    return _act_and_mul(x, "silu")


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """See `nbllm_kernels.gelu_and_mul`.

    Raises:
        ValueError: `approximate` is neither "none" nor "tanh".
    """
    require(
        approximate in ("none", "tanh"),
        lambda: f"approximate must be none or tanh: {approximate!r}",
    )
    return _act_and_mul(x, "gelu" if approximate == "none" else "gelu_tanh")


def _act_and_mul(x: Tensor, activation: str) -> Tensor:
    require_float("x", x)
    require(x.shape[-1] % 2 == 0, lambda: f"x must have an even last dimension: {describe(x)}")
    size = x.shape[-1] // 2
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(size, _BLOCK))
        _act_and_mul_kernel[grid](
            rows,
            out,
            rows.stride(0),
            SIZE=size,
            ACTIVATION=activation,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
