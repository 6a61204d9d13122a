"""Poller: a daemon thread that looks at something again and again, while somebody watches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Poller:
    """Calls `look` at an interval between `start` and `stop`; all methods return at once.

    Args:
        look: called in the thread, never twice at a time; False ends it.
        interval_s: seconds from one call's end to the next.
    """

    def __init__(self, look: Callable[[], bool], interval_s: float) -> None:
        self._look = look
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._looking = threading.Lock()  # a thread may still look after its `stop`
        # Not an Event: an interrupt of who sets it can leave its lock taken.
        self._ends: queue.SimpleQueue[None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """True from `start` to `stop`, or until `look` ended it."""
        thread = self._thread
        return self._ends is not None and thread is not None and thread.is_alive()

    def start(self) -> None:
        """Look from now on. Idempotent."""
        with self._lock:
            if self.is_running:
                return
            self._ends = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=self._run, args=(self._ends,), name="nbllm-poller", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Look no more; a look that has begun comes to its end. Idempotent."""
        with self._lock:
            ends, self._ends = self._ends, None
            if ends is not None:
                ends.put(None)

    def _run(self, ends: queue.SimpleQueue[None]) -> None:
        while True:
            with self._looking:
                if not ends.empty() or not self._look():
                    return
            try:
                ends.get(timeout=self._interval_s)
                return
            except queue.Empty:
                continue
