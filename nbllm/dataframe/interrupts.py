"""OneInterrupt: the first Ctrl-C ends a call's rows, and no other one disturbs what follows."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class OneInterrupt:
    """Between a first Ctrl-C, or `hold`, and the end of the block no other one is raised.

    A context manager. In another thread than the main one, which gets no Ctrl-C, it does nothing.

    Attributes:
        came_late: there was none before `hold`, and one after it.
    """

    def __init__(self) -> None:
        self.came_late = False
        self._is_held = False
        self._was_raised = False
        self._previous: Any = None

    def __enter__(self) -> OneInterrupt:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):  # else Ctrl-C raises nothing
                self._previous = previous
                signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def hold(self) -> None:
        """From now on none is raised. Idempotent."""
        self._is_held = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self.came_late = not self._was_raised
            return
        # Held before it is raised: there is no moment at which the next one could get through.
        self._is_held = self._was_raised = True
        self._previous(number, frame)
        self._is_held = self._was_raised = False
