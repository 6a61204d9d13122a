"""Passes: a call of an accessor goes over rows once, or several times, and ends with a result.

It is written as a generator of `RowCall`s: each is run to its end before the next is asked for,
the generator is sent its rows then, and returns the result of the call. So what `sim_join` does
between its two columns, or `summarize` from round to round, stands in one function, whether a cell
waits for it or a job runs it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeAlias

from nbllm.dataframe.call_options import CallOptions
from nbllm.dataframe.row_job import RowJob
from nbllm.progress import ProgressBar, in_notebook, progress_bar

if TYPE_CHECKING:
    from nbllm.dataframe.row_call import RowCall

Steps: TypeAlias = Generator["RowCall", RowJob, Any]
"""The passes of a call; the rows of each are sent when they have ended, and the result returned."""


class Passes:
    """One run of a call: `begin`, compute the rows, `end`, until `begin` has no more.

    Args:
        steps: of the call.
        options: of the call: its progress is one bar.
        has_card: in a notebook the progress is that of the job's card, which a cell may show.

    Attributes:
        counted: the rows of the passes that have begun, but for those that are not counted.
        rows: those of the pass that was begun last, or None.
        result: what the call returns, once there are no more passes.
    """

    def __init__(self, steps: Steps, options: CallOptions, *, has_card: bool = False) -> None:
        self._steps = steps
        self._label = options.label
        self._use_tqdm = options.use_tqdm
        if has_card and options.use_tqdm is True and in_notebook():
            self._use_tqdm = False
        self.counted: list[RowJob] = []
        self.rows: RowJob | None = None
        self.result: Any = None
        self._call: RowCall | None = None
        self._has_ended = False
        self._shown: ProgressBar | None = None
        self._silent = progress_bar(None, "", enabled=False)

    @property
    def num_rows(self) -> int:
        """Rows that are answered when it is done, as far as it is known."""
        return sum(len(rows.rows) for rows in self.counted)

    @property
    def num_done(self) -> int:
        """Rows that have ended, well or not."""
        return sum(len(rows.settled) for rows in self.counted)

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV cache in use, from 0 to 1; 0 before the first pass."""
        return 0.0 if self._call is None else self._call.verb.llm.kv_cache_usage

    @property
    def bar(self) -> ProgressBar:
        """Shows how far the pass has come."""
        if self._shown is None or self._call is None or not self._call.is_counted:
            return self._silent
        return self._shown

    def begin(self) -> RowJob | None:
        """Open the next pass; None if there is none, and `result` is there.

        Raises:
            InvalidRequestError: something is wrong with it.
            JournalError: the journal can't be used.
        """
        try:
            self._call = next(self._steps) if self.rows is None else self._steps.send(self.rows)
        except StopIteration as end:
            self.result, self._has_ended = end.value, True
            return None
        self.rows = self._call.open()
        if self._call.is_counted:
            self.counted.append(self.rows)
            self._expect(len(self.rows.rows))
        return self.rows

    def end(self, stacklevel: int) -> None:
        """Close the pass that was computed, and tell of its errors as `errors` says.

        Args:
            stacklevel: of warnings, as in `warnings.warn`.

        Raises:
            JournalError: its results can't be kept.
            Exception: the first error, with `errors="raise"`.
        """
        assert self._call is not None and self.rows is not None
        self._call.close()
        self._call.report(self.rows, stacklevel + 1)

    def frame(self) -> Any:
        """The result; before the end what the pass that was begun last comes to, so far."""
        if self._has_ended or self._call is None or self.rows is None:
            return self.result
        return self._call.make_result(self.rows)

    def mark_unfinished(self) -> None:
        """What an interrupt leaves behind."""
        if self.rows is not None:
            self.rows.mark_unfinished()

    def close(self) -> None:
        """Let go of what a pass holds, and show the last of the progress. Idempotent."""
        if self._shown is not None:
            self._shown.close()
        if self._call is not None:
            self._call.close()

    def _expect(self, num_rows: int) -> None:
        if self._shown is not None:
            self._shown.expect(num_rows)
            return
        self._shown = progress_bar(
            num_rows,
            self._label,
            enabled=self._use_tqdm,
            unit="row",
            gauge=lambda: self.kv_cache_usage,
        )
