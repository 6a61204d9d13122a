"""Programmatic dependent launch: a kernel starts while the one before it still runs (sm_90).

A kernel launched with `launch_options` begins as soon as every program of its predecessor in the
stream has triggered (`gdc_launch_dependents`) or ended. What it does before `gdc_wait` overlaps
the predecessor's end: it computes addresses and requests weights. `gdc_wait` returns when the
predecessor has completed and its writes are visible.

The rules, for every kernel that takes part:

1. All programs of it wait, whatever path they take, also those that have nothing to do: that a
   kernel has completed must mean that all before it have.
2. Before its wait a kernel may touch only constants (weights, tables), or data written by something
   older than the last kernel that triggers after its wait; a kernel launched the plain way counts
   as one. It writes nothing before its wait.
3. `norm_linear`, which begins a layer, triggers after its wait; the others before theirs, which is
   earlier. So positions, slots, block tables and the old pages of the cache, all written by
   earlier steps or before the first layer, may be read early by every other kernel of a layer; the
   hidden states, the query and the new keys and values may not.

Kernels take `LAUNCH_PDL: tl.constexpr` and guard both calls by it: without programmatic launch the
same arithmetic runs in the same order, so results are the same to the bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_MIN_CAPABILITY = (9, 0)
_enabled = True


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch that takes part in the protocol, if the device can."""
    if _enabled and _has_programmatic_launch(device):
        return {"LAUNCH_PDL": True, "launch_pdl": True, "enable_fp_fusion": True}
    return {"LAUNCH_PDL": False, "enable_fp_fusion": True}


@contextlib.contextmanager
def without_programmatic_launch() -> Iterator[None]:
    """Launch the plain way within: to compare, and to look for a hazard."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@functools.cache
def _has_programmatic_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
