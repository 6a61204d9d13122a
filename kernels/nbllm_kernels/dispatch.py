"""Which implementation serves a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """True for a tensor on the current CUDA device, False for one on the CPU.

    Raises:
        ValueError: another kind of device, or a CUDA device that is not the current one (Triton
            launches on the current device, whatever its arguments are on).
    """
    device = tensor.device
    if device.type == "cpu":
        return False
    if device.type != "cuda":
        raise ValueError(f"tensors must be on cpu or cuda, not {device}")
    if device.index != torch.cuda.current_device():
        raise ValueError(
            f"tensors are on {device}, but the current device is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device first"
        )
    return True
