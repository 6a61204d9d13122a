"""rms_norm: root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from nbllm_kernels import cpu_elementwise, cpu_native
from nbllm_kernels.dispatch import runs_triton


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: None = None, weight_offset: float = 0.0
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize the last dimension; add a residual first if there is one.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size].
        eps: added to the mean square.
        residual: like x, added to x before normalization.
        weight_offset: added to the weight; Gemma's is 1.

    Returns:
        the normalized tensor; with a residual, also the sum x + residual.
    """
    if runs_triton(x):
        from nbllm_kernels.gpu import rms_norm as gpu

        return gpu.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    total = x if residual is None else x + residual
    native = cpu_native.takes_rms_norm(total, weight)
    norm = cpu_native.rms_norm if native else cpu_elementwise.rms_norm
    normed = norm(total, weight, eps, weight_offset)
    return normed if residual is None else (normed, total)
