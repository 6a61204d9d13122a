"""Checks of the launchers: a kernel reads through raw pointers and trusts what it is told."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise ValueError(message()) unless the condition holds.

    The message is made only then: describing a tensor takes longer than launching a kernel.
    """
    if not condition:
        raise ValueError(message())


def require_float(name: str, tensor: Tensor, ndim: int | None = None) -> None:
    """A tensor of a dtype that the kernels compute, its last dimension without gaps."""
    require(
        tensor.dtype in FLOATS,
        lambda: f"{name} must be float16, bfloat16 or float32: {tensor.dtype}",
    )
    if ndim is not None:
        require(
            tensor.ndim == ndim, lambda: f"{name} must have {ndim} dimensions: {describe(tensor)}"
        )
    dense = tensor.ndim > 0 and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1)
    require(dense, lambda: f"{name} must have a last dimension of stride 1: {describe(tensor)}")


def require_like(name: str, tensor: Tensor, other: Tensor) -> None:
    """A tensor on the device and of the dtype of another."""
    require(
        tensor.dtype == other.dtype and tensor.device == other.device,
        lambda: (
            f"{name} must be {other.dtype} on {other.device}: {describe(tensor)} on {tensor.device}"
        ),
    )


def require_index(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A contiguous tensor of exactly this shape, dtype and device."""
    require(
        tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(),
        lambda: f"{name} must be contiguous {list(shape)} {dtype}: {describe(tensor)}",
    )
    require(tensor.device == device, lambda: f"{name} must be on {device}: {tensor.device}")


def describe(tensor: Tensor) -> str:
    """Shape, strides and dtype in words."""
    return f"{list(tensor.shape)}, strides {list(tensor.stride())}, {tensor.dtype}"
