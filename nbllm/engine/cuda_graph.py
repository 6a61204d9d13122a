"""GraphCache: work on the device that is the same every time, captured once and replayed.

A captured function reads and writes buffers that stay where they are; what differs from run to run
is in them. The first run of each key is not captured: a text's first tokens do not wait for a
capture that may never pay. It is made when the work comes again, or before that if there is nothing
else to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 256  # each takes some memory; what is rare enough to come later runs as it is


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
        self._may_capture = True
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
            if self.is_enabled and self._may_capture and self._num_keys < _MAX_GRAPHS:
                self._uncaptured[key] = work
            return
        graph.replay()
        self.num_replays += 1

    def capture_next(self) -> bool:
        """Capture what has run, but not yet again; nothing runs. For the time between requests.

        Returns:
            False if there is nothing of that kind.
        """
        if not self._uncaptured:
            return False
        self._capture(next(iter(self._uncaptured)))
        return True

    def clear(self) -> None:
        """Let go of everything that was captured, or might be."""
        self._graphs.clear()
        self._uncaptured.clear()

    @property
    def _num_keys(self) -> int:
        return len(self._graphs) + len(self._uncaptured)

    def _capture(self, key: Hashable) -> torch.cuda.CUDAGraph | None:
        work = self._uncaptured.pop(key)
        graph = self._record(work)
        if graph is None:
            self._uncaptured.clear()
        else:
            self._graphs[key] = graph
        return graph

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # thread_local: what the notebook does on the GPU in the meantime is its own business.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=torch.cuda.current_stream(),
                capture_error_mode="thread_local",
            ):
                work()
        except RuntimeError as error:  # most likely memory; the work itself can go on
            self._may_capture = False
            logger.warning("no more CUDA graphs are captured from now on: %s", error)
            return None
        return graph
