"""RequestStream: how the requests of one call report back to whoever made it.

The engine's thread marks requests as changed; the reader takes all that changed since it last
looked. Tokens are not copied into the stream: a request's token list only grows, so a mark is just
"it has this many tokens now", and a slow reader finds one mark where a fast one found ten. That
keeps the engine's work per token constant, whatever the readers do.

The reader may be interrupted at any bytecode, so it shares nothing with the engine's thread but
locks and queues that are made in C. `threading.Condition`, and so `Event`, is Python: an interrupt
inside of its `__enter__` leaves its lock taken, and the engine would wait for it for ever.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Iterable
from weakref import ref

from nbllm.engine.request import Request
from nbllm.interruptible import get

Progress = tuple[Request, int]
"""A request, and how many generated tokens of it may be read."""


class _Waker:
    """Wakes the coroutines of one event loop.

    A message to a loop is a system call, after which another thread may have the interpreter: so
    there is one for all the streams that a step has changed, not one for each.
    """

    def __init__(self) -> None:
        # Weak, as an event has its loop, which must be free to go.
        self._ready: deque[ref[asyncio.Event]] = deque()
        self._is_called = False  # and the call will find what is in the queue by now

    def wake(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
        """Set `ready` in its loop; from any thread."""
        self._ready.append(ref(ready))
        if not self._is_called:
            self._is_called = True
            try:
                loop.call_soon_threadsafe(self._set_all)
            except RuntimeError:
                pass  # the reader's loop is closed: nobody is there to wake

    def _set_all(self) -> None:
        self._is_called = False  # before the queue is read: what is added later calls again
        try:
            while self._ready:
                event = self._ready.popleft()()
                if event is not None:
                    event.set()
        finally:
            if self._ready:  # an interrupt
                asyncio.get_running_loop().call_soon(self._set_all)


class _OfThread(threading.local):
    """The loop that ran last in this thread, and its waker.

    Not a WeakKeyDictionary: that calls Python code when a loop goes, and a KeyboardInterrupt that
    is raised in there is lost.
    """

    loop: ref[asyncio.AbstractEventLoop] | None = None
    waker = _Waker()


_of_thread = _OfThread()


def _waker_of(loop: asyncio.AbstractEventLoop) -> _Waker:
    if _of_thread.loop is None or _of_thread.loop() is not loop:
        _of_thread.loop, _of_thread.waker = ref(loop), _Waker()
    return _of_thread.waker


class RequestStream:
    """Thread-safe; one reader, either `take()` from a thread or `take_async()` from an event loop.

    Marks are unbounded in number but there is at most one per request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[Request, int] = {}
        self._wakings: queue.SimpleQueue[None] = queue.SimpleQueue()  # none or one
        self._waiter: tuple[_Waker, asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, requests: Iterable[Request]) -> None:
        """Mark requests as changed. Never blocks for longer than a dictionary update."""
        with self._lock:
            is_first = not self._changed
            for request in requests:
                self._changed[request] = request.num_output_tokens
            if is_first and self._changed:
                self._wakings.put(None)
            self._wake_coroutine()

    def take(self, timeout_s: float | None = None) -> list[Progress]:
        """Wait for changes and return them; empty after `timeout_s` seconds without one.

        The wait frees the GIL and ends soon on KeyboardInterrupt.
        """
        try:
            get(self._wakings, timeout_s)
        except queue.Empty:
            return []
        return self._take_now()

    async def take_async(self) -> list[Progress]:
        """The same from a coroutine of any event loop."""
        loop = asyncio.get_running_loop()
        waker = _waker_of(loop)
        while True:
            with self._lock:
                if self._changed:
                    self._wakings.get()
                    break
                ready = asyncio.Event()
                self._waiter = (waker, loop, ready)
            await ready.wait()
        return self._take_now()

    def _take_now(self) -> list[Progress]:
        with self._lock:
            changed = list(self._changed.items())
            self._changed.clear()
            return changed

    def _wake_coroutine(self) -> None:
        if self._waiter is not None:
            waker, loop, ready = self._waiter
            self._waiter = None
            waker.wake(loop, ready)
