"""GraphCache: work on the device that is the same every time, captured once and replayed.

A captured function reads and writes buffers that stay where they are; what differs from run to run
is in them. The first run of each key is not captured: a text's first tokens do not wait for a
capture that may never pay.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

_RUNS_BEFORE_CAPTURE = 1
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
        self._num_runs: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do some work, from now on always under the same key.

        Args:
            key: stands for the function and all of its buffers.
            work: enqueues it on the current stream; free of synchronization.
        """
        graph = self._graphs.get(key)
        if graph is None and self._num_runs[key] >= _RUNS_BEFORE_CAPTURE and self._wants_more():
            graph = self._capture(work)
            if graph is not None:
                self._graphs[key] = graph
        if graph is None:
            work()
            self._num_runs[key] += 1
            return
        graph.replay()
        self.num_replays += 1

    def _wants_more(self) -> bool:
        return self.is_enabled and self._may_capture and len(self._graphs) < _MAX_GRAPHS

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
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
