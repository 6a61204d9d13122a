"""OpenMP's threads, which compute PyTorch's CPU operators and ours.

GCC's OpenMP gives each thread that computes a pool of its own. Once the pools together have more
threads than there are cores, their threads sleep between two operators instead of waiting awake:
then every operator takes 60 us longer, and a decode step of a small model has hundreds. In a
notebook that happens at once: the cell computes something, and the engine's thread something else.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch

_OMP_PAUSE_SOFT = 1


def _find_pause() -> Callable[[int], int] | None:
    """GCC's `omp_pause_resource_all` (OpenMP 5.0); that of LLVM would stop all threads' pools."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "__kmpc_fork_call") or not hasattr(loaded, "omp_pause_resource_all"):
        return None
    pause: Callable[[int], int] = loaded.omp_pause_resource_all
    return pause


_pause = _find_pause()


def release_threads() -> None:
    """End the calling thread's pool; its next parallel operator makes a new one, in 0.1 ms.

    For a thread that will not compute for a while.
    """
    if _pause is not None:
        _pause(_OMP_PAUSE_SOFT)
