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
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._uncaptured: dict[Hashable, Callable[[], None]] = {}  # what has run once
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do some work, from now on always under the same key.

        Args:
            key: stands for the function and all of its buffers.
            work: enqueues it on the current stream; free of synchronization.
        """
        graph = self._graphs.get(key)
        if graph is None and key in self._uncaptured:
            graph = self._capture(key)
        if graph is None:
            work()
            if self._may_capture:
                self._uncaptured[key] = work
            return
        graph.replay()
        self.num_replays += 1

    def clear(self) -> None:
        """Let go of everything that was captured, or might be."""
        self._graphs.clear()
        self._uncaptured.clear()

    @property
    def _may_capture(self) -> bool:
        num_keys = len(self._graphs) + len(self._uncaptured)
        return self.is_enabled and num_keys < _MAX_GRAPHS and self._num_failures < _MAX_FAILURES

    def _capture(self, key: Hashable) -> torch.cuda.CUDAGraph | None:
        work = self._uncaptured.pop(key)
        try:
            graph = self._record(work)
        except RuntimeError as error:  # the work itself can go on
            self._num_failures += 1
            self._pool = None  # PyTorch takes it for one that is still being recorded to
            if self._num_failures == _MAX_FAILURES:
                self._uncaptured.clear()
                logger.warning("no more CUDA graphs are captured from now on: %s", error)
            return None
        self._graphs[key] = graph
        return graph

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture on the current stream.

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
        return graph
