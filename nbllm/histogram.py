"""Histogram: how often values fell into which range, as Prometheus counts them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts values by ranges; to add one costs the same however many there are.

    Args:
        bounds: the largest value of each range, ascending; a last range without one is added.

    Attributes:
        bounds: the same.
        sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value, `times` times."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, number of values up to it) for each bound, and last for infinity."""
        total = 0
        found = []
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append((bound, total))
        return found

    def flat(self, name: str) -> dict[str, float]:
        """As numbers with names: `<name>_bucket_<bound>` for each bound, `<name>_sum`."""
        buckets: dict[str, float] = {
            f"{name}_bucket_{bound:g}": count for bound, count in self.cumulative()
        }
        return buckets | {f"{name}_sum": self.sum}
