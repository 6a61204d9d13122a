"""FrameCall: one call of an accessor, whoever waits for it: the cell, a job, a coroutine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing
from typing import Any

import nbllm
from nbllm.dataframe.call_options import CallOptions, check_choice
from nbllm.dataframe.frame_job import FrameJob
from nbllm.dataframe.interrupts import OneInterrupt
from nbllm.dataframe.passes import Passes, Steps
from nbllm.errors import Interrupted


class FrameCall(ABC):
    """A call whose arguments were checked.

    Attributes:
        options: how it treats its rows.
    """

    options: CallOptions

    @abstractmethod
    def steps(self) -> Steps:
        """Its passes over rows; the generator returns the result."""

    def answer(self, job: bool, *, stacklevel: int = 3) -> Any:
        """What a verb with the argument `job` returns: `submit` if it is True, else `run`.

        Raises:
            InvalidRequestError: it is neither True nor False; and as `run`.
        """
        check_choice("job", job, (True, False))
        return self.submit(has_card=True) if job else self.run(stacklevel=stacklevel)

    def run(self, *, stacklevel: int = 2) -> Any:
        """Answer all rows and return the result.

        Args:
            stacklevel: of warnings, as in `warnings.warn`: 2 is who called the verb that called.

        Raises:
            InvalidRequestError: values are missing, and must not.
            Interrupted: Ctrl-C; the result so far is its `.partial`, and `nbllm.last`. Another one
                while that is made changes nothing.
            JournalError: results can't be kept; the result so far is `nbllm.last`.
        """
        passes = Passes(self.steps(), self.options)
        with OneInterrupt() as interrupts:
            try:
                with closing(passes):
                    while (rows := passes.begin()) is not None:
                        rows.run(passes.bar)
                        interrupts.hold()
                        passes.end(stacklevel + 2)
                        interrupts.release()
            except KeyboardInterrupt:
                interrupts.hold()
                passes.mark_unfinished()
                nbllm.last = passes.frame()
                if self.options.on_interrupt == "raise":
                    raise Interrupted(partial=nbllm.last) from None
                return nbllm.last
            except BaseException:
                interrupts.hold()
                if passes.rows is not None:
                    nbllm.last = passes.frame()
                raise
        return passes.result

    def submit(self, *, has_card: bool = False) -> FrameJob:
        """The same beside the cell; what is wrong with the first pass is raised at once.

        Args:
            has_card: the user gets the job, and may show it: see `Passes`.
        """
        passes = Passes(self.steps(), self.options, has_card=has_card)
        try:
            passes.begin()
            return FrameJob(passes)
        except BaseException:
            passes.close()
            raise
