"""OneInterrupt: one Ctrl-C ends a call's rows, and no further one disturbs what follows."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class OneInterrupt:
    """While the KeyboardInterrupt of a Ctrl-C is on its way out, no other one is raised; nor
    between `hold` and `release`.

    If something on its way has swallowed it (a destructor, a bare `except` of the user), the next
    Ctrl-C is raised again.

    A context manager. In another thread than the main one, which gets no Ctrl-C, it does nothing.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._came_late = False  # one that was held back
        self._raised: BaseException | None = None
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
        self._raised = None  # its traceback has the frames of the call

    def hold(self) -> None:
        """From now on none is raised. Idempotent."""
        self._is_held = True

    def release(self) -> None:
        """End of `hold`: one that came meanwhile is raised."""
        self._is_held = False
        if self._came_late:
            self._came_late = False
            self._raised = KeyboardInterrupt()
            raise self._raised

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._raised is not None and _is_handled(self._raised):
            return
        if self._is_held:
            self._came_late = True
            return
        try:
            self._previous(number, frame)
        except BaseException as error:
            self._raised = error
            raise


def _is_handled(error: BaseException) -> bool:
    """True while a handler of `error`, or of what was raised in one, runs in this thread."""
    handled = sys.exc_info()[1]
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is not None
