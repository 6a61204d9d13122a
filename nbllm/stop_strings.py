"""StopFinder: the first of many strings in a text that arrives piece by piece."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache


class StopFinder:
    """Hunts for stop strings one character at a time, so that tokens' borders don't matter.

    What may become a stop string is followed as ranges in the sorted list of all of them: a range
    holds those that go on as the text did so far, and every character narrows it by bisection. So
    a character costs no more with 100,000 strings than with one, as long as few of them overlap.

    The string that ends first is found; of several that end together, the one that begins first.

    Args:
        stops: not empty strings.

    Attributes:
        position: number of characters seen.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.position = 0
        self._stops, self._ranges = _index(tuple(stops))
        self._open: list[tuple[int, int, int]] = []  # (where it began, range), in that order

    @property
    def open_from(self) -> int:
        """Position of the first character that may belong to a stop string yet to come."""
        return self._open[0][0] if self._open else self.position

    def feed(self, text: str, *, may_match: bool = True) -> tuple[int, str] | None:
        """Go on with `text`.

        Args:
            text: the next characters.
            may_match: False lets strings pass that end in `text`.

        Returns:
            where a stop string begins, and the string; or None. After that, the finder is done.
        """
        for char in text:
            hit = self._step(char)
            if hit is not None and may_match:
                return hit
        return None

    def _step(self, char: str) -> tuple[int, str] | None:
        hit: tuple[int, str] | None = None
        still_open: list[tuple[int, int, int]] = []
        for start, low, high in self._open:
            depth = self.position - start

            def char_at(stop: str, depth: int = depth) -> str:
                return stop[depth : depth + 1]  # empty, so first, if it ended before

            low = bisect_left(self._stops, char, low, high, key=char_at)
            high = bisect_right(self._stops, char, low, high, key=char_at)
            if low < high:
                still_open.append((start, low, high))
                if hit is None and len(self._stops[low]) == depth + 1:
                    hit = (start, self._stops[low])
        if char in self._ranges:
            low, high = self._ranges[char]
            still_open.append((self.position, low, high))
            if hit is None and len(self._stops[low]) == 1:
                hit = (self.position, char)
        self._open = still_open
        self.position += 1
        return hit


@lru_cache(maxsize=32)  # the engine and the reader of every request of a call share it
def _index(stops: tuple[str, ...]) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The sorted strings, and the range of those that begin with each character."""
    ordered = sorted(set(stops))
    ranges: dict[str, tuple[int, int]] = {}
    for number, stop in enumerate(ordered):
        low, _ = ranges.get(stop[0], (number, number))
        ranges[stop[0]] = (low, number + 1)
    return ordered, ranges
