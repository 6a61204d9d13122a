"""OneInterrupt: the first Ctrl-C ends a call's rows, and no other one disturbs what follows."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class OneInterrupt:
    """After a first Ctrl-C no other one is raised to the end of the block, nor between `hold` and
    `release`.

    A context manager. In another thread than the main one, which gets no Ctrl-C, it does nothing.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._was_raised = False
        self._came_late = False  # one that was held back
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

    def release(self) -> None:
        """End of `hold`: one that came meanwhile is raised."""
        self._is_held = self._was_raised = self._came_late
        if self._came_late:
            self._came_late = False
            raise KeyboardInterrupt

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._came_late = not self._was_raised
            return
        # Held before it is raised: there is no moment at which the next one could get through.
        self._is_held = self._was_raised = True
        self._previous(number, frame)
        self._is_held = self._was_raised = False
