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
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import nbllm
from nbllm.dataframe.job_card import JobCard
from nbllm.dataframe.job_stats import JobStats
from nbllm.dataframe.passes import Passes
from nbllm.errors import Interrupted
from nbllm.interruptible import result_of, woken_often


class FrameJob:
    """A handle; `await job` and `job.result()` give what the call would have returned.

    Args:
        passes: of the call; the first has begun. The job closes them.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._future: Future[Any] = Future()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._started = time.monotonic()
        self._ended: float | None = None
        self._card = JobCard(passes, self._future, self._line)
        self._thread = threading.Thread(target=self._run, name="nbllm-frame-job", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # an interrupt while the thread begins: nobody gets the handle
            self.cancel()
            raise

    @property
    def frame(self) -> Any:
        """The result as far as the rows have ended; the others are missing.

        Of a verb that goes over rows several times it is, before the end, what comes of the last
        time: of `dedup` the vectors so far, of `join` the pairs with p(yes) where it is known.
        """
        return self._passes.frame()

    @property
    def num_done(self) -> int:
        """Rows that have ended, well or not."""
        return self._passes.num_done

    @property
    def num_rows(self) -> int:
        """Rows that are answered when it is done, as far as it is known."""
        return self._passes.num_rows

    @property
    def stats(self) -> JobStats:
        """Rows, tokens and their rates, as of now or of the end."""
        ended = time.monotonic() if self._ended is None else self._ended
        return JobStats.of(self._passes, ended - self._started)

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
            return result_of(self._future, timeout)
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
            with woken_often():
                return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except Interrupted as error:  # in a task, a KeyboardInterrupt would stop its whole loop
            raise asyncio.CancelledError(str(error)) from error

    def _line(self) -> str:
        stats = self.stats
        line = f"{self._state()}: {stats}"
        if self.done():
            return line
        line += f", KV cache {self._passes.kv_cache_usage:.0%}"
        return line if stats.seconds_left is None else f"{line}, {stats.seconds_left:,.1f} s left"

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
        """Go through the passes to their end, or to the cancellation, and close them."""
        passes = self._passes
        try:
            with closing(self._loop), closing(passes):
                self._loop.run_until_complete(self._run_passes())
        except BaseException as error:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            if is_cancelled:
                passes.mark_unfinished()
            nbllm.last = passes.frame()
            if is_cancelled:
                raise Interrupted("the job was cancelled", partial=nbllm.last) from None
            raise
        finally:
            self._ended = time.monotonic()
        return passes.result

    async def _run_passes(self) -> None:
        self._task = asyncio.current_task()
        passes = self._passes
        rows = passes.rows  # of the first, which has begun
        while rows is not None:
            if self._is_cancelled:
                raise asyncio.CancelledError
            await rows.arun(passes.bar)
            passes.end(3)
            rows = passes.begin()
