"""JobCard: what a cell shows of a job, kept up to date where it stands.

Plain HTML that is replaced through its display id: the saved notebook has the last state.
"""

from __future__ import annotations

import html
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from nbllm.dataframe.passes import Passes
from nbllm.dataframe.row_job import RowJob
from nbllm.notebook_cell import show_replaceable

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.1
_NUM_ROWS = 5
_NUM_CHARACTERS = 200


class JobCard:
    """One output of a cell, or of several.

    Args:
        passes: what is run.
        future: done when the job has ended.
        make_line: what is said of the job as a whole.
    """

    def __init__(self, passes: Passes, future: Future[Any], make_line: Callable[[], str]) -> None:
        self._passes = passes
        self._future = future
        self._make_line = make_line
        self._id = uuid.uuid4().hex
        self._follower: threading.Thread | None = None

    def show(self) -> None:
        """Show it in the cell that runs.

        Raises:
            NotImplementedError: as `show_replaceable`.
        """
        show_replaceable({self._id: self.bundle()})
        if self._follower is None:
            self._follower = threading.Thread(target=self._run, name="nbllm-job-card", daemon=True)
            self._follower.start()

    def join(self) -> None:
        """Wait until the end of the job is shown, wherever it is shown at all."""
        if self._follower is not None:
            self._follower.join()

    def bundle(self) -> dict[str, str]:
        """A line, and the first rows that have ended, those that failed before the others."""
        line, last = self._make_line(), self._passes.rows
        ended = [(row, last) for row in last.first_ended(_NUM_ROWS)] if last is not None else []
        rows = [(str(row), *_end_of(last, row)) for row, last in ended]
        head = "<tr><th>row</th><th></th><th>result</th></tr>"
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        table = f"<table>{head}{body}</table>" if rows else ""
        text = "\n".join([line, *("  ".join(row) for row in rows)])
        shown = f"{self._bar()}<code>{html.escape(line)}</code>{table}"
        return {"text/plain": text, "text/html": shown}

    def _bar(self) -> str:
        """The share of the rows that have ended, until the job has."""
        if self._future.done():
            return ""
        num_rows = self._passes.num_rows
        share = self._passes.num_done / num_rows if num_rows else 1.0
        return f'<progress value="{share:.3f}" max="1"></progress> '

    def _run(self) -> None:
        from IPython.display import update_display

        try:
            is_last = False
            shown: dict[str, str] = {}
            while not is_last:
                is_last = bool(wait([self._future], _INTERVAL_S).done)
                bundle = self.bundle()
                if bundle != shown:
                    shown = bundle
                    data: Any = bundle
                    update_display(data, raw=True, display_id=self._id)
        except Exception:  # nobody waits for a picture: the job goes on
            logger.exception("the job is shown no more")


def _end_of(rows: RowJob, row: int) -> tuple[str, str]:
    error = rows.errors.get(row)
    if error is not None:
        return "failed", _cut(str(error) or type(error).__name__)
    result = rows.results[row]
    assert result is not None
    if result.texts:
        return "done", _cut(result.texts[0])
    numbers = ", ".join(f"{number:.4g}" for number in result.numbers[:_NUM_ROWS])
    return "done", numbers + (", …" if len(result.numbers) > _NUM_ROWS else "")


def _cut(text: str) -> str:
    """On one line, of a bounded length."""
    line = " ".join(text[: 2 * _NUM_CHARACTERS].split())
    return line if len(line) <= _NUM_CHARACTERS else line[:_NUM_CHARACTERS] + "…"
