"""silu_and_mul, gelu_and_mul: the gated activations of SwiGLU and GeGLU (arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels import reference


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x = [..., gate | up]; returns [..., half]."""
    return reference.silu_and_mul(x)


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up for x = [..., gate | up]; `approximate` is "none" or "tanh"."""
    return reference.gelu_and_mul(x, approximate)
