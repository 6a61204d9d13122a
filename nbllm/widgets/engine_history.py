"""EngineHistory: what an engine did in the last minute, from looks at its counters."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import NamedTuple

from nbllm.outputs import EngineSnapshot

WINDOW_S = 60.0
_SPACING_S = 0.45  # between two points of a curve; looks may be closer
_SMOOTHED_S = 2.0  # a rate is that of so long


class _Counters(NamedTuple):
    """Sums since the engine started, as of a time in seconds."""

    time_s: float
    prompt_tokens: float
    generation_tokens: float
    prefix_queries: float
    prefix_hits: float
    preemptions: float


class Rates(NamedTuple):
    """Tokens per second. Those of prompts that were found in the prefix cache do not count."""

    prompt: float
    generation: float


class EngineHistory:
    """Keeps what it is shown for `WINDOW_S` seconds; the engine itself keeps only sums."""

    def __init__(self) -> None:
        self._points: deque[_Counters] = deque()
        self._last: _Counters | None = None

    def add(self, snapshot: EngineSnapshot, now: float) -> None:
        """Take a look at the engine, made at `now` in seconds of any clock that only grows."""
        metrics = snapshot.metrics
        self._last = _Counters(
            now,
            metrics["prompt_tokens_by_source_local_compute"],
            metrics["generation_tokens"],
            metrics["prefix_cache_queries"],
            metrics["prefix_cache_hits"],
            metrics["num_preemptions"],
        )
        if not self._points or now - self._points[-1].time_s >= _SPACING_S:
            self._points.append(self._last)
        # One that is older stays: the window begins between it and the next.
        while len(self._points) > 1 and self._points[1].time_s <= now - WINDOW_S:
            self._points.popleft()

    @property
    def rates(self) -> Rates:
        """Over the last seconds; zeros before the second look."""
        last = self._last
        if last is None:
            return Rates(0.0, 0.0)
        before = [point for point in self._points if point.time_s <= last.time_s - _SMOOTHED_S]
        return _rates(before[-1] if before else self._points[0], last)

    def curve(self) -> list[tuple[float, Rates]]:
        """(seconds ago, rates up to then), the oldest first."""
        if self._last is None:
            return []
        points = [*self._points]
        if points[-1] is not self._last:
            points.append(self._last)
        now = self._last.time_s
        return [(now - new.time_s, _rates(old, new)) for old, new in pairwise(points)]

    @property
    def prefix_hit_share(self) -> float | None:
        """Of the prompt tokens looked up in the last minute, 0 to 1; None if there were none."""
        if self._last is None:
            return None
        first = self._points[0]
        queries = self._last.prefix_queries - first.prefix_queries
        return (self._last.prefix_hits - first.prefix_hits) / queries if queries else None

    @property
    def num_preemptions(self) -> int:
        """In the last minute."""
        return int(self._last.preemptions - self._points[0].preemptions) if self._last else 0


def _rates(old: _Counters, new: _Counters) -> Rates:
    seconds = new.time_s - old.time_s
    if seconds <= 0:
        return Rates(0.0, 0.0)
    return Rates(
        (new.prompt_tokens - old.prompt_tokens) / seconds,
        (new.generation_tokens - old.generation_tokens) / seconds,
    )
