"""GraphCache: work on the device that is the same every time, captured once and replayed.

A captured function reads and writes buffers that stay where they are; what differs from run to run
is in them. The first run of each key is not captured: a text's first tokens do not wait for a
capture that may never pay.

Nothing is captured while nobody waits for a result, though there would be time: as long as any
stream of a process is being captured, `torch.cuda.synchronize()` is an error in every thread (CUDA
C++ programming guide, "prohibited and unhandled operations" of stream capture), and when no call is
running a cell may well say that.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 256  # each takes some memory; what is rare enough to come later runs as it is
_MAX_FAILURES = 3  # somebody may have synchronized the device; three times it is something else


class GraphCache:
    """CUDA graphs by key, in one pool of memory: they run one after the other on one stream.

    Args:
        is_enabled: False runs everything as it is.

    Attributes:
        is_enabled: as given.
        num_replays: graphs replayed so far.
    """

    def __init__(self, *, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self.num_replays = 0
        self._num_failures = 0
        self._graphs: dict[Hashable, Callable[[], None]] = {}  # each enqueues one
        self._uncaptured: dict[Hashable, Callable[[], None]] = {}  # what has run once
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do some work, from now on always under the same key.

        Args:
            key: stands for the function and all of its buffers.
            work: enqueues it on the current stream; free of synchronization.
        """
        replay = self._graphs.get(key)
        if replay is None and key in self._uncaptured:
            replay = self._capture(key)
        if replay is None:
            work()
            if self._may_capture:
                self._uncaptured[key] = work
            return
        replay()
        self.num_replays += 1

    def clear(self) -> None:
        """Let go of everything that was captured, or might be."""
        self._graphs.clear()
        self._uncaptured.clear()

    @property
    def _may_capture(self) -> bool:
        num_keys = len(self._graphs) + len(self._uncaptured)
        return self.is_enabled and num_keys < _MAX_GRAPHS and self._num_failures < _MAX_FAILURES

    def _capture(self, key: Hashable) -> Callable[[], None] | None:
        work = self._uncaptured.pop(key)
        try:
            replay = self._record(work)
        except RuntimeError as error:  # the work itself can go on
            self._num_failures += 1
            self._pool = None  # PyTorch takes it for one that is still being recorded to
            if self._num_failures == _MAX_FAILURES:
                self._uncaptured.clear()
                logger.warning("no more CUDA graphs are captured from now on: %s", error)
            return None
        self._graphs[key] = replay
        return replay

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture on the current stream; returns what enqueues the same work again.

        Not with `torch.cuda.graph`, which first waits for the device, runs the cycle collector and
        gives unused memory back: steps are pending, and what they wait for is this one.
        """
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: what the notebook does on the GPU in the meantime is its own business.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return _make_replay(graph)


def _make_replay(graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
    """What enqueues a captured graph on the current stream.

    `CUDAGraph.replay` lets go of the interpreter's lock, for a launch of some ten microseconds. To
    get it back from a cell that computes in pure Python takes hundreds, and eight launches follow
    one another: so this calls the driver itself and keeps the lock, where the driver is found under
    its usual name.
    """
    launch = _driver_launch()
    if launch is None:
        return graph.replay

    def replay() -> None:
        stream = torch.cuda.current_stream()
        status = launch(graph.raw_cuda_graph_exec(), stream.cuda_stream)
        if status:
            raise RuntimeError(f"CUDA error {status} (cuGraphLaunch)")

    return replay


@functools.cache
def _driver_launch() -> Callable[[int, int], int] | None:
    try:
        launch = ctypes.PyDLL("libcuda.so.1").cuGraphLaunch
    except (OSError, AttributeError):
        return None
    launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    launch.restype = ctypes.c_int
    return launch
