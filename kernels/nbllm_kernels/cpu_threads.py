"""OpenMP's threads, which compute PyTorch's CPU operators and ours.

GCC's OpenMP gives each thread that computes a pool of its own. Once the pools together have more
threads than there are cores, their threads sleep between two operators instead of waiting awake:
then every operator takes 60 us longer, and a decode step of a small model has hundreds. In a
notebook that happens at once: the cell computes something, and the engine's thread something else.

An operator of several threads waits for the last of them. Where a browser wants the same cores,
that is one that has lost its core for milliseconds, so small operators are better off with one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def _find_set_num_threads() -> Callable[[int], None] | None:
    """`omp_set_num_threads`, which is for the calling thread; PyTorch's own is for all."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    set_num_threads: Callable[[int], None] | None
    set_num_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    return set_num_threads


_pause = _find_pause()
_set_num_threads = _find_set_num_threads()


def release_threads() -> None:
    """End the calling thread's pool; its next parallel operator makes a new one, in 0.1 ms.

    For a thread that will not compute for a while.
    """
    if _pause is not None:
        _pause(_OMP_PAUSE_SOFT)


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators of the calling thread compute in it alone meanwhile. Other threads' don't change.

    Does nothing where PyTorch computes without OpenMP.
    """
    if _set_num_threads is None:
        yield
        return
    # Also because PyTorch sets the number of a thread that it has not seen yet, when it is asked.
    num_threads = torch.get_num_threads()
    _set_num_threads(1)
    try:
        yield
    finally:
        _set_num_threads(num_threads)
