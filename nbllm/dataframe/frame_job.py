"""FrameJob: a DataFrame call that runs beside the cell.

job = df.llm.submit("question", out="answer")
job             # a table that follows it
job.frame       # as far as it has come
job.stats       # how far, and how fast
job.result()    # waits
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

from nbllm.dataframe.job_card import JobCard
from nbllm.dataframe.job_stats import JobStats
from nbllm.dataframe.row_job import RowJob
from nbllm.errors import Interrupted
from nbllm.progress import ProgressBar


class FrameJob:
    """A handle; `await job` and `job.result()` give what the call would have returned.

    Args:
        rows: what is run.
        make_frame: the result, from what is there.
        bar: shows the progress.
        finish: called at the end, whatever comes: closes what the job holds.
        prepare: awaited before the rows, or None.
    """

    def __init__(
        self,
        rows: RowJob,
        make_frame: Callable[[], Any],
        bar: ProgressBar,
        finish: Callable[[], None],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._rows = rows
        self._make_frame = make_frame
        self._bar = bar
        self._finish = finish
        self._prepare = prepare
        self._future: Future[Any] = Future()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._started = time.monotonic()
        self._ended: float | None = None
        self._card = JobCard(rows, self._future, lambda: f"{self._state()}: {self.stats}")
        self._thread = threading.Thread(target=self._run, name="nbllm-frame-job", daemon=True)
        self._thread.start()

    @property
    def frame(self) -> Any:
        """The result as far as the rows have ended; the others are missing."""
        return self._make_frame()

    @property
    def num_done(self) -> int:
        """Rows that have ended, well or not."""
        return len(self._rows.settled)

    @property
    def num_rows(self) -> int:
        """Rows that are answered when it is done."""
        return len(self._rows.rows)

    @property
    def stats(self) -> JobStats:
        """Rows, tokens and their rates, as of now or of the end."""
        ended = time.monotonic() if self._ended is None else self._ended
        return JobStats.of(self._rows, ended - self._started)

    def done(self) -> bool:
        """True once `result` does not wait any more."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end.

        Args:
            timeout: seconds; TimeoutError after that, and the job goes on.

        Raises:
            Interrupted: the job was cancelled; `.partial` is the frame so far.
        """
        try:
            return self._future.result(timeout)
        finally:
            if self._future.done():
                self._card.join()  # the cell ends with its last state

    def cancel(self) -> None:
        """Stop: what has ended is in `frame`, and in the journal. Idempotent."""
        self._is_cancelled = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._cancel_task)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    def __repr__(self) -> str:
        return f"FrameJob({self._state()}, {self.num_done:,} of {self.num_rows:,} rows)"

    def _ipython_display_(self) -> None:
        self._card.show()

    def _repr_html_(self) -> str:
        return self._card.bundle()["text/html"]

    async def _wait(self) -> Any:
        future = asyncio.wrap_future(self._future)
        future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except Interrupted as error:  # in a task, a KeyboardInterrupt would stop its whole loop
            raise asyncio.CancelledError(str(error)) from error

    def _state(self) -> str:
        if not self.done():
            return "running"
        error = self._future.exception()
        if error is None:
            return "done"
        return "cancelled" if isinstance(error, Interrupted) else f"failed: {error}"

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            self._future.set_result(self._outcome())
        except BaseException as error:  # whoever waits gets it, and nobody waits for ever
            self._future.set_exception(error)

    def _outcome(self) -> Any:
        """Run the rows to their end, or to the cancellation, and close what the job holds."""
        try:
            with closing(self._loop), closing(self._bar):
                self._loop.run_until_complete(self._run_rows())
        except asyncio.CancelledError:
            self._rows.mark_unfinished()
            raise Interrupted("the job was cancelled", partial=self._make_frame()) from None
        finally:
            self._ended = time.monotonic()
            self._finish()
        return self._make_frame()

    async def _run_rows(self) -> None:
        self._task = asyncio.current_task()
        if self._is_cancelled:
            raise asyncio.CancelledError
        if self._prepare is not None:
            await self._prepare()
        await self._rows.arun(self._bar)
