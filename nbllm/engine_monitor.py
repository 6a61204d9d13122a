"""EngineMonitor: the methods of `LLM` that say how its engine is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbllm.outputs import EngineSnapshot

if TYPE_CHECKING:
    from nbllm.engine.engine_thread import EngineThread


class EngineMonitor:
    """The engine answers between two steps, which costs it microseconds."""

    _thread: EngineThread

    def get_metrics(self) -> dict[str, float | int]:
        """Counters and gauges of the engine, under vLLM's names."""
        return self._thread.call(lambda engine: engine.metrics())

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that requests held after the last step, 0 to 1; never waits."""
        return self._thread.kv_cache_usage

    def snapshot(
        self, max_requests: int | None = None, *, timeout_s: float | None = None
    ) -> EngineSnapshot:
        """The metrics, the pages and the requests in flight, all of one moment.

        Args:
            max_requests: how many requests are listed, those that run before those that wait; None
                lists all.
            timeout_s: how long to wait for the step that runs; None waits as long as it takes.

        Raises:
            TimeoutError: the engine was busy for longer than `timeout_s`.
            EngineClosedError, EngineDeadError: there is no engine any more.
        """
        return self._thread.call(lambda engine: engine.snapshot(max_requests), timeout_s)

    def is_healthy(self) -> bool:
        """True if the engine takes requests and its steps make progress."""
        return self._thread.is_healthy()
