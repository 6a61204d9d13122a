"""Waits that end although the signal itself has not woken them."""

from __future__ import annotations

import _thread
import asyncio
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from nbllm.engine.request_stream import RequestStream
from nbllm.interruptible import get, result_of, woken_often


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C has its usual effect, also where a shell started the tests in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    "wait",
    [
        lambda: get(queue.SimpleQueue()),
        lambda: result_of(Future()),
        RequestStream().take,
    ],
    ids=["queue", "future", "stream"],
)
def test_an_interrupt_that_does_not_wake_the_wait_ends_it(wait: Callable[[], Any]) -> None:
    presser = threading.Thread(target=_thread.interrupt_main)  # says it, but sends no signal
    with pytest.raises(KeyboardInterrupt):
        _start_and(presser, wait)
    presser.join()


def _start_and(thread: threading.Thread, wait: Callable[[], Any]) -> None:
    thread.start()
    wait()


def test_an_item_that_is_there_needs_no_time() -> None:
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    items.put(1)
    assert get(items, 0) == 1
    with pytest.raises(queue.Empty):
        get(items, 0)


def test_a_wait_takes_as_long_as_was_asked_for() -> None:
    start = time.monotonic()
    with pytest.raises(queue.Empty):
        get(queue.SimpleQueue(), 0.5)
    with pytest.raises(TimeoutError):
        result_of(Future(), 0.5)
    assert time.monotonic() - start >= 0.99


def test_a_result_is_what_the_future_came_to() -> None:
    future: Future[int] = Future()
    future.set_result(1)
    assert result_of(future, 0) == 1
    failed: Future[int] = Future()
    failed.set_exception(ValueError("why"))
    with pytest.raises(ValueError, match="why"):
        result_of(failed)


def test_a_loop_sees_what_a_handler_has_left_it_without_waking_it() -> None:
    async def wait() -> None:
        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        # Not thread-safe, as in a handler: the loop is not woken.
        thread = threading.Thread(target=lambda: loop.call_soon(seen.set))
        with woken_often():
            thread.start()
            await seen.wait()
        thread.join()

    asyncio.run(wait())


def test_a_loop_that_goes_runs_no_python_code_in_which_an_interrupt_could_be_lost() -> None:
    async def wait() -> list[Any]:
        waiting = asyncio.create_task(RequestStream().take_async())
        await asyncio.sleep(0)
        waiting.cancel()
        return [ref.__callback__ for ref in weakref.getweakrefs(asyncio.get_running_loop())]

    assert set(asyncio.run(wait())) == {None}
