"""The CPU time of a server's process, divided into the model's and the server's own.

The model's threads are the one that runs it and those of OpenMP. All others are the server's: the
event loop with HTTP and JSON, and the pools of threads that it hands work to. The server's, too, is
what the model's own thread does to hand a token over: it tells the reader here, while it decodes
the token and puts its text into a queue in the peer. So both are measured from the moment at which
a token is known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MODEL_THREADS = ("nbllm-engine", "generate")  # names of those that run a model

_hand_overs: list[float] = []  # seconds of each; appending to a list needs no lock


def count_hand_over(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which the model's thread hands a token over with, counted as the server's."""

    def counted(*arguments: Any) -> None:
        begin = time.thread_time()
        function(*arguments)
        _hand_overs.append(time.thread_time() - begin)

    return counted


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of CPU time, user and system, since the process began.

    Attributes:
        process: of all threads, those that ended too.
        server: of the Python threads that run now and are not the model's, and of what
            `count_hand_over` has counted; None if this system does not tell the times of threads
            (it is not Linux).
    """

    process: float
    server: float | None

    @classmethod
    def now(cls) -> CpuTimes:
        """Of this process."""
        process = time.process_time()
        if not hasattr(time, "pthread_getcpuclockid"):
            return cls(process, None)
        idents = [
            thread.ident
            for thread in threading.enumerate()
            if not thread.name.startswith(_MODEL_THREADS) and thread.ident is not None
        ]
        clocks = map(time.pthread_getcpuclockid, idents)
        return cls(process, sum(map(time.clock_gettime, clocks)) + sum(_hand_overs))

    def __sub__(self, earlier: CpuTimes) -> CpuTimes:
        server = None
        if self.server is not None and earlier.server is not None:
            server = self.server - earlier.server
        return CpuTimes(self.process - earlier.process, server)

    def __add__(self, other: CpuTimes) -> CpuTimes:
        server = None
        if self.server is not None and other.server is not None:
            server = self.server + other.server
        return CpuTimes(self.process + other.process, server)
