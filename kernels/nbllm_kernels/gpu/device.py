"""Measured properties of a device, by which launch sizes are chosen."""

from __future__ import annotations

import functools

import torch


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a device; the interpreter's are few, so that small shapes take several programs."""
    if device.type != "cuda":
        return 16
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
