"""Progress of a long call, right where it is shown: a notebook, a terminal or a log file."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

_NOTEBOOK_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 30.0


class ProgressBar(Protocol):
    """What `progress_bar` returns."""

    def update(self, count: int, **stats: int) -> None:
        """Count `count` more units done, and add to the running totals of `stats`."""

    def expect(self, count: int) -> None:
        """So many more units are to come than was said before."""

    def close(self) -> None:
        """Show the final state; it stays visible."""


def progress_bar(
    total: int | None,
    label: str,
    *,
    enabled: bool | Callable[..., Any] = True,
    unit: str = "row",
    gauge: Callable[[], float] | None = None,
) -> ProgressBar:
    """A progress display that suits where the output goes.

    In a notebook it is one line that is updated in place and stays, finished, in the saved file;
    in a terminal it is tqdm's bar; in a pipe or log file a plain line every 30 seconds.

    Args:
        total: units to come, or None if unknown.
        label: what is being done.
        enabled: False shows nothing; a callable makes a tqdm-like bar (`total=`, `desc=`,
            `unit=`), as vLLM's `use_tqdm`.
        unit: name of one unit.
        gauge: the share of the KV cache in use, from 0 to 1; asked whenever the line is shown.
    """
    if enabled is False:
        return _Silent()
    if callable(enabled):
        return _Tqdm(enabled(total=total, desc=label, unit=unit), unit)
    if in_notebook():
        return _Notebook(total, label, unit, gauge)
    if _is_terminal():
        from tqdm import tqdm

        return _Tqdm(tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True), unit)
    return _Log(total, label, unit, gauge)


class _Silent:
    def update(self, count: int, **stats: int) -> None:
        pass

    def expect(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Counter:
    """Counts and describes; the subclasses show."""

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str,
        gauge: Callable[[], float] | None = None,
    ) -> None:
        self._total = total
        self._label = label
        self._unit = unit
        self._gauge = gauge
        self._done = 0
        self._stats: dict[str, int] = {}
        self._start = time.monotonic()
        self._last_shown = self._start
        self._is_closed = False

    def expect(self, count: int) -> None:
        if self._total is not None:
            self._total += count

    def _add(self, count: int, stats: dict[str, int]) -> None:
        self._done += count
        _add_to(self._stats, stats)

    def _describe(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        of_total = f"/{self._total:,}" if self._total is not None else ""
        plural = "" if (self._total or self._done) == 1 else "s"
        parts = [
            f"{self._done:,}{of_total} {self._unit}{plural}",
            f"{self._done / elapsed:,.1f}/s",
        ]
        tokens = self._stats.get("tokens")
        if tokens:
            parts.append(f"{tokens / elapsed:,.0f} tokens/s")
        parts += _shares_and_failures(self._stats)
        if self._gauge is not None and not self._is_closed:
            parts.append(f"KV cache {self._gauge():.0%}")
        if not self._is_closed and self._total and 0 < self._done < self._total:
            parts.append(f"{_duration(elapsed / self._done * (self._total - self._done))} left")
        else:
            parts.append(f"{_duration(elapsed)}")
        return f"{self._label}: " + ", ".join(parts)


class _Notebook(_Counter):
    """One output of the cell, replaced in place through its display id.

    tqdm's notebook bar is a widget whose saved form reads "0%" for ever.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str,
        gauge: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(total, label, unit, gauge)
        from IPython.display import display

        self._handle = display(self._bundle(), raw=True, display_id=True)

    def update(self, count: int, **stats: int) -> None:
        self._add(count, stats)
        now = time.monotonic()
        if now - self._last_shown >= _NOTEBOOK_INTERVAL_S:
            self._last_shown = now
            self._show()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._show()

    def _show(self) -> None:
        if self._handle is not None:
            self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        text = self._describe()
        share = min(self._done / self._total, 1.0) if self._total else 0.0
        bar = f'<progress value="{share:.3f}" max="1" style="width:16em"></progress> '
        return {"text/plain": text, "text/html": f"{bar}<code>{html.escape(text)}</code>"}


class _Log(_Counter):
    """A plain line now and then: a log has no cursor to move back."""

    def update(self, count: int, **stats: int) -> None:
        self._add(count, stats)
        now = time.monotonic()
        if now - self._last_shown >= _LOG_INTERVAL_S:
            self._last_shown = now
            self._show()

    def close(self) -> None:
        was_closed, self._is_closed = self._is_closed, True
        if not was_closed and time.monotonic() - self._start >= _LOG_INTERVAL_S:
            self._show()  # a short call leaves no trace in a log

    def _show(self) -> None:
        if sys.stderr is not None:
            sys.stderr.write(self._describe() + "\n")


class _Tqdm:
    """Adapter of tqdm, and of what a callable `use_tqdm` makes."""

    def __init__(self, bar: Any, unit: str) -> None:
        self._bar = bar
        self._unit = unit
        self._start = time.monotonic()
        self._stats: dict[str, int] = {}

    def update(self, count: int, **stats: int) -> None:
        _add_to(self._stats, stats)
        if hasattr(self._bar, "set_postfix_str"):
            rate = self._stats.get("tokens", 0) / max(time.monotonic() - self._start, 1e-9)
            parts = [f"{rate:,.0f} tokens/s", *_shares_and_failures(self._stats)]
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(count)

    def expect(self, count: int) -> None:
        if getattr(self._bar, "total", None) is not None:
            self._bar.total += count

    def close(self) -> None:
        self._bar.close()


def _add_to(totals: dict[str, int], stats: dict[str, int]) -> None:
    for name, value in stats.items():
        totals[name] = totals.get(name, 0) + value


def _shares_and_failures(stats: dict[str, int]) -> list[str]:
    """How much of the prompts was in the prefix cache, and how many rows came to nothing."""
    parts = []
    if "cached_tokens" in stats and stats.get("prompt_tokens"):
        parts.append(f"{stats['cached_tokens'] / stats['prompt_tokens']:.0%} prefix hits")
    if stats.get("failed"):
        parts.append(f"{stats['failed']:,} failed")
    return parts


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def in_notebook() -> bool:
    """True inside an IPython kernel; IPython's terminal has no display to update."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
