"""norm_linear, norm_gated_linear: a product of what an RMSNorm gives, in one kernel for few rows.

With few rows a layer's time is that of its launches and of reading its weights: what stands before
and after a product is computed by the product's own programs.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nbllm_kernels.activation import gelu_and_mul, silu_and_mul
from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.linear import Weight, linear
from nbllm_kernels.rms_norm import rms_norm


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    batch_invariant: bool = False,
) -> Tensor:
    """rms_norm(x) W^T + b.

    Args:
        x: [num_rows, in_features].
        norm_weight: [in_features].
        eps, weight_offset: as in `rms_norm`.
        weight, bias, batch_invariant: as in `linear`.

    Returns:
        [num_rows, out_features].
    """
    if isinstance(weight, Tensor) and not batch_invariant and runs_triton(x):
        from nbllm_kernels.gpu import skinny_linear as gpu

        if gpu.can_multiply(x, weight):
            norm = gpu.Norm(norm_weight, eps, weight_offset)
            return gpu.skinny_linear(x, weight, bias, norm=norm)
    normed = rms_norm(x, norm_weight, eps, weight_offset=weight_offset)
    return linear(normed, weight, bias, batch_invariant=batch_invariant)


def norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu",
    weight_offset: float = 0.0,
    batch_invariant: bool = False,
) -> Tensor:
    """act(gate) * up, gate and up the halves of rms_norm(x) W^T + b.

    Args:
        x: [num_rows, in_features].
        weight: [2 * size, in_features]: the rows of the gate, then those of up.
        activation: of the gate.
        norm_weight, eps, bias, weight_offset, batch_invariant: as in `norm_linear`.

    Returns:
        [num_rows, size].
    """
    if isinstance(weight, Tensor) and not batch_invariant and runs_triton(x):
        from nbllm_kernels.gpu import skinny_linear as gpu

        if gpu.can_multiply(x, weight):
            norm = gpu.Norm(norm_weight, eps, weight_offset)
            return gpu.skinny_linear(x, weight, bias, norm=norm, activation=activation)
    gate_up = norm_linear(
        x,
        norm_weight,
        eps,
        weight,
        bias,
        weight_offset=weight_offset,
        batch_invariant=batch_invariant,
    )
    if activation == "silu":
        return silu_and_mul(gate_up)
    return gelu_and_mul(gate_up, "none" if activation == "gelu" else "tanh")
