"""silu_and_mul, gelu_and_mul: the gated activations of SwiGLU and GeGLU (arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels import cpu_native, reference
from nbllm_kernels.dispatch import runs_triton


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x = [..., gate | up]; returns [..., half]."""
    if runs_triton(x):
        from nbllm_kernels.gpu import activation as gpu

        return gpu.silu_and_mul(x)
    if cpu_native.takes_gate(x):
        return cpu_native.silu_and_mul(x)
    return reference.silu_and_mul(x)


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up for x = [..., gate | up]; `approximate` is "none" or "tanh"."""
    if runs_triton(x):
        from nbllm_kernels.gpu import activation as gpu

        return gpu.gelu_and_mul(x, approximate)
    if approximate == "tanh" and cpu_native.takes_gate(x):
        return cpu_native.gelu_tanh_and_mul(x)
    return reference.gelu_and_mul(x, approximate)
