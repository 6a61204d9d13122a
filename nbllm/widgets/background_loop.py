"""The event loop on which widgets wait for the engine: one daemon thread for all of them.

Callbacks of widgets come from whatever thread the frontend's message reached. They only put work
into this loop, and all state of a generation lives in its thread.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from nbllm.interruptible import get

T = TypeVar("T")

_NAME = "nbllm-widgets"
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork copies no threads


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started when it is first asked for."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name=_NAME, daemon=True).start()
        return loop


def in_background(function: Callable[..., Any], *args: Any) -> None:
    """Call a function in the loop's thread, after all that was asked for before."""
    background_loop().call_soon_threadsafe(function, *args)


def is_background() -> bool:
    """True in the loop's thread, where nobody may wait for it."""
    return threading.current_thread().name == _NAME


def wait_for(register: Callable[[Callable[[], None]], None], timeout_s: float | None) -> bool:
    """Wait until somebody in the loop calls back; False after `timeout_s` seconds.

    Args:
        register: called in the loop's thread with what is to be called back.
        timeout_s: None waits as long as it takes.
    """
    # Not an Event: an interrupt of its reader can leave its lock taken, and the loop would hang.
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    in_background(register, lambda: done.put(None))
    try:
        get(done, timeout_s)
    except queue.Empty:
        return False
    return True


def call_in_background(function: Callable[[], T]) -> T:
    """The result of a function that is called in the loop's thread; raises what it raises."""
    if is_background():
        return function()
    results: list[T] = []
    errors: list[Exception] = []

    def call(done: Callable[[], None]) -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)
        done()

    wait_for(call, None)
    if errors:
        raise errors[0]
    return results[0]
