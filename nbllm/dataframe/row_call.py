"""RowCall: one pass over rows, with what becomes of them; of most verbs it is the whole call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pandas as pd

from nbllm.dataframe.call_options import CallOptions
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.jobs import JobDescription, open_journal
from nbllm.dataframe.journal import Journal
from nbllm.dataframe.passes import Passes, Steps
from nbllm.dataframe.prompts import Prompts
from nbllm.dataframe.provenance import with_provenance
from nbllm.dataframe.row_job import RowJob, Verb
from nbllm.errors import InvalidRequestError


@dataclass(slots=True)
class RowCall(FrameCall):
    """A verb, its rows, and what becomes of them.

    Attributes:
        verb: what is done.
        prompts: one per row.
        options: checked.
        make_frame: (rows, as they are) -> what is returned.
        wanted: positions of the rows that have no answer yet; None is all.
        description: what is written beside a journal.
        warn: (rows, stacklevel) -> warns of what the frame does not show, when all have ended.
        is_counted: its rows are those of the user's call; others are neither counted nor shown.
    """

    verb: Verb
    prompts: Prompts
    options: CallOptions
    make_frame: Callable[[RowJob], Any]
    wanted: Sequence[int] | None = None
    description: JobDescription | None = None
    warn: Callable[[RowJob, int], None] | None = None
    is_counted: bool = True
    _journal: Journal | None = field(default=None, init=False)

    def steps(self) -> Steps:
        """See `FrameCall.steps`."""
        return self.make_result((yield self))

    def stream(self) -> Iterator[Any]:
        """Frames of the rows that have ended, as they end; `errors="raise"` raises the first.

        Making one goes through all rows, so that it is done in a tenth of the time at most.
        """
        num_shown, started, seconds = 0, 0.0, 0.0
        with closing(Passes(self.steps(), self.options)) as passes:
            rows = passes.begin()
            assert rows is not None
            with closing(rows.stream(passes.bar)) as steps:
                for _ in chain(steps, [None]):
                    is_last = len(rows.settled) == len(rows.rows)
                    if not is_last and time.perf_counter() - started < 10 * seconds:
                        continue
                    if rows.errors and self.options.errors == "raise":
                        raise next(iter(rows.errors.values()))
                    ended = sorted(rows.settled[num_shown:])
                    if ended:
                        num_shown = len(rows.settled)
                        started = time.perf_counter()
                        piece = self.make_result(rows).iloc[ended]
                        seconds = time.perf_counter() - started
                        yield piece

    def open(self) -> RowJob:
        """The rows, with the journal if there is one; `close` ends it.

        Raises:
            InvalidRequestError: values are missing, and must not.
            JournalError: the journal can't be used.
        """
        options = self.options
        identity = ""
        if options.journal is not None:
            identity = self.verb.llm.identity
            self._journal = open_journal(options.journal, self.description)
        try:
            rows = RowJob(
                self.verb,
                self.prompts,
                rows=self.wanted,
                missing=self.prompts.missing(),
                dedupe=options.dedupe,
                in_order=options.order == "given",
                max_errors=options.max_errors,
                journal=self._journal,
                model_identity=identity,
            )
            if options.na == "raise" and rows.num_missing:
                raise InvalidRequestError(
                    f"{rows.num_missing} rows have missing values", parameter="na"
                )
        except BaseException:
            self.close()
            raise
        return rows

    def close(self) -> None:
        """Write what is known to the journal, and let others use it. Idempotent.

        Raises:
            JournalError: it could not be written.
        """
        if self._journal is not None:
            self._journal.close()

    def report(self, rows: RowJob, stacklevel: int) -> None:
        """Raise the first error, or warn of them all, where `errors` says so.

        Args:
            rows: all have ended.
            stacklevel: as in `warnings.warn`.
        """
        errors = self.options.errors
        first = next(iter(rows.errors.values()), None)
        if first is not None and errors == "raise":
            raise first
        if self.warn is not None:
            self.warn(rows, stacklevel + 1)
        if first is not None and errors == "warn":
            warnings.warn(
                f"{len(rows.errors)} of {len(rows.rows)} rows failed; the first: {first}",
                stacklevel=stacklevel,
            )

    def make_result(self, rows: RowJob) -> Any:
        """`make_frame`; in the attrs of a frame with its new columns is where they come from."""
        made, description = self.make_frame(rows), self.description
        if description is None or description.owner or not isinstance(made, pd.DataFrame):
            return made
        return with_provenance(made, description)
