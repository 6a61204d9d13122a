"""Waits that end on Ctrl-C, and on a notebook's Stop button.

A thread that is about to wait looks for signals, may have to wait for the GIL then, and sleeps in
C: a Ctrl-C that comes in between does not wake it. And where a cell awaits, ipykernel's handler
leaves the loop a callback, but does not wake it (its issue 881). So no wait here is a long one.
"""

from __future__ import annotations

import asyncio
import math
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

_SLICE_S = 0.2
_WAKING_S = 0.5

T = TypeVar("T")


def get(items: queue.SimpleQueue[T], timeout_s: float | None = None) -> T:
    """The next item.

    Raises:
        queue.Empty: none came within `timeout_s` seconds; None waits as long as it takes.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            return items.get(timeout=max(min(_SLICE_S, left_s), 0.0))
        except queue.Empty:
            if left_s <= _SLICE_S:
                raise


def result_of(future: Future[T], timeout_s: float | None = None) -> T:
    """What it came to.

    Raises:
        TimeoutError: it has not ended within `timeout_s` seconds; None waits as long as it takes.
        BaseException: what it has failed with.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while not future.done():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"it has not ended after {timeout_s} s")
        wait([future], min(_SLICE_S, left_s))
    return future.result()


@contextmanager
def woken_often() -> Iterator[None]:
    """Inside, the event loop that runs wakes now and then, and sees what a handler has left it."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def wake() -> None:
        nonlocal timer
        timer = loop.call_later(_WAKING_S, wake)

    wake()
    try:
        yield
    finally:
        timer.cancel()
