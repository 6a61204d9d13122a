"""RowCall: one call of an accessor, from its checked arguments to the frame that it returns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pandas as pd

import nbllm
from nbllm.dataframe.frame_job import FrameJob
from nbllm.dataframe.interrupts import OneInterrupt
from nbllm.dataframe.jobs import JobDescription, open_journal
from nbllm.dataframe.journal import Journal
from nbllm.dataframe.prompts import Prompts
from nbllm.dataframe.provenance import with_provenance
from nbllm.dataframe.row_job import RowJob, Verb
from nbllm.errors import Interrupted, InvalidRequestError
from nbllm.progress import progress_bar


@dataclass(slots=True)
class CallOptions:
    """How a call treats its rows; each is an argument of the accessors' methods.

    Attributes:
        na: "skip" leaves rows with missing values unanswered, "fill" makes empty texts of them,
            "raise" refuses them.
        errors: "column" puts why a row failed into a column, "warn" only warns, "raise" raises the
            first one.
        on_interrupt: "raise" raises `Interrupted` with the frame so far, "return" returns it.
        dedupe: rows that are alike are computed once; "auto": where chance has no part.
        order: "prefix" computes together what begins alike, "given" as it stands.
        journal: name of a job, or a folder, where results are kept and found.
        use_tqdm: show progress; or a callable that makes a tqdm-like bar.
        label: what the progress says is done.
    """

    na: str = "skip"
    errors: str = "column"
    on_interrupt: str = "raise"
    dedupe: bool | str = "auto"
    order: str = "prefix"
    journal: Any = None
    use_tqdm: Any = True
    label: str = "Generating"

    def check(self) -> None:
        """Raise InvalidRequestError, which names the argument, for a value that is none."""
        for parameter, allowed in (
            ("na", ("skip", "fill", "raise")),
            ("errors", ("column", "warn", "raise")),
            ("on_interrupt", ("raise", "return")),
            ("dedupe", (True, False, "auto")),
            ("order", ("prefix", "given")),
        ):
            check_choice(parameter, getattr(self, parameter), allowed)


def check_choice(parameter: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise InvalidRequestError unless `value` is one of `allowed`."""
    if not any(
        value is other or (type(value) is type(other) and value == other) for other in allowed
    ):
        choices = ", ".join(map(repr, allowed))
        raise InvalidRequestError(
            f"{parameter} must be one of {choices}, got {value!r}", parameter=parameter
        )


@dataclass(slots=True)
class RowCall:
    """A verb, its rows, and what becomes of them.

    Attributes:
        verb: what is done.
        prompts: one per row.
        options: checked.
        make_frame: (rows, as they are) -> what is returned.
        wanted: positions of the rows that have no answer yet; None is all.
        description: what is written beside a journal.
        prepare: awaited before the rows of a job beside the cell are run, there.
        report: (rows, stacklevel) -> warns of what the frame does not show, when all have ended.
    """

    verb: Verb
    prompts: Prompts
    options: CallOptions
    make_frame: Callable[[RowJob], Any]
    wanted: Sequence[int] | None = None
    description: JobDescription | None = None
    prepare: Callable[[], Awaitable[None]] | None = None
    report: Callable[[RowJob, int], None] | None = None
    _journal: Journal | None = field(default=None, init=False)

    def answer(self, job: bool) -> Any:
        """What a verb with the argument `job` returns: `submit` if it is True, else `run`.

        Raises:
            InvalidRequestError: it is neither True nor False; and as `run`.
        """
        check_choice("job", job, (True, False))
        return self.submit() if job else self.run(stacklevel=3)

    def run(self, *, stacklevel: int = 2) -> Any:
        """Answer all rows and return the frame.

        Args:
            stacklevel: of warnings, as in `warnings.warn`: 2 is who called the verb that called.

        Raises:
            InvalidRequestError: values are missing, and must not.
            Interrupted: Ctrl-C; the frame so far is its `.partial`, and `nbllm.last`. Another one
                while that is made changes nothing.
            JournalError: results can't be kept; the frame so far is `nbllm.last`.
        """
        with OneInterrupt() as interrupts:
            rows = self._open()
            try:
                with closing(self._bar(rows)) as bar:
                    rows.run(bar)
                interrupts.hold()
            except KeyboardInterrupt:
                interrupts.hold()
                rows.mark_unfinished()
                nbllm.last = self._result(rows)
                if self.options.on_interrupt == "raise":
                    raise Interrupted(partial=nbllm.last) from None
                return nbllm.last
            except BaseException:
                interrupts.hold()
                nbllm.last = self._result(rows)
                raise
            finally:
                self._close()
            self._report(rows, stacklevel + 2)
            result = self._result(rows)
        if interrupts.came_late:
            nbllm.last = result
            raise Interrupted(partial=result)
        return result

    def stream(self) -> Iterator[Any]:
        """Frames of the rows that have ended, as they end; `errors="raise"` raises the first.

        Making one goes through all rows, so that it is done in a tenth of the time at most.
        """
        rows = self._open()
        num_shown, started, seconds = 0, 0.0, 0.0
        try:
            with closing(self._bar(rows)) as bar, closing(rows.stream(bar)) as steps:
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
                        piece = self._result(rows).iloc[ended]
                        seconds = time.perf_counter() - started
                        yield piece
        finally:
            self._close()

    def submit(self) -> FrameJob:
        """The same beside the cell."""
        rows = self._open()

        def finish() -> None:
            is_cut = len(rows.settled) < len(rows.rows)
            if is_cut:
                nbllm.last = self._result(rows)
            self._close()
            if not is_cut:
                self._report(rows, 3)

        try:
            return FrameJob(rows, lambda: self._result(rows), self._bar(rows), finish, self.prepare)
        except BaseException:
            self._close()
            raise

    def _report(self, rows: RowJob, stacklevel: int) -> None:
        """Raise the first error, or warn of them all, where `errors` says so."""
        errors = self.options.errors
        first = next(iter(rows.errors.values()), None)
        if first is not None and errors == "raise":
            nbllm.last = self._result(rows)
            raise first
        if self.report is not None:
            self.report(rows, stacklevel + 1)
        if first is not None and errors == "warn":
            warnings.warn(
                f"{len(rows.errors)} of {len(rows.rows)} rows failed; the first: {first}",
                stacklevel=stacklevel,
            )

    def _result(self, rows: RowJob) -> Any:
        made = self.make_frame(rows)
        if self.description is None or not isinstance(made, pd.DataFrame):
            return made
        return with_provenance(made, self.description)

    def _open(self) -> RowJob:
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
                journal=self._journal,
                model_identity=identity,
            )
            if options.na == "raise" and rows.num_missing:
                raise InvalidRequestError(
                    f"{rows.num_missing} rows have missing values", parameter="na"
                )
        except BaseException:
            self._close()
            raise
        return rows

    def _bar(self, rows: RowJob) -> Any:
        options = self.options
        llm = self.verb.llm
        return progress_bar(
            len(rows.rows),
            options.label,
            enabled=options.use_tqdm,
            unit="row",
            gauge=lambda: llm.kv_cache_usage,
        )

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
