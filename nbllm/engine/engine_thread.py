"""EngineThread: the one thread that owns the engine and the device.

Everybody else (cells, event loops, server, widgets) sends commands through its inbox and reads
results from a `RequestStream`. An interrupt of a cell reaches the cell's own wait, never this
thread.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from nbllm.engine.engine import Engine
from nbllm.engine.request import FinishReason, Request
from nbllm.engine.request_stream import RequestStream
from nbllm.errors import EngineClosedError, EngineDeadError
from nbllm_kernels import release_threads

logger = logging.getLogger(__name__)

_SHORT_INTERVAL_S = 2e-4
_HIGH_THRESHOLD = 50_000  # new objects

T = TypeVar("T")
_Command = Callable[[], None]


class _BusyInterpreter:
    """Settings of the interpreter while some engine of the process has something to do.

    The switch interval is how long Python lets a thread run before another one that waits gets its
    turn. Every operator of PyTorch lets go of the interpreter's lock; to get it back from a cell
    that computes in pure Python takes a whole interval, by default 5 ms, many times the operator
    itself.

    The collector of cycles looks at all young objects whenever there are 700 more of them. A row is
    some forty, none of them garbage before its end, so that this takes a seventh of the host's
    time; it looks less often meanwhile.
    """

    _lock = threading.Lock()
    _num_busy = 0
    _usual_interval = 0.0
    _usual_threshold = 0

    def __init__(self) -> None:
        self._is_busy = False

    def set(self, *, is_busy: bool) -> None:
        """Say whether this engine has something to do."""
        if is_busy == self._is_busy:
            return
        self._is_busy = is_busy
        shared = _BusyInterpreter
        with shared._lock:
            if is_busy and shared._num_busy == 0:
                shared._usual_interval = sys.getswitchinterval()
                sys.setswitchinterval(min(_SHORT_INTERVAL_S, shared._usual_interval))
                shared._usual_threshold, *others = gc.get_threshold()
                if 0 < shared._usual_threshold < _HIGH_THRESHOLD:  # 0 is off
                    gc.set_threshold(_HIGH_THRESHOLD, *others)
            shared._num_busy += 1 if is_busy else -1
            if shared._num_busy == 0:  # unless somebody has set them in the meantime
                if sys.getswitchinterval() <= _SHORT_INTERVAL_S:
                    sys.setswitchinterval(shared._usual_interval)
                if gc.get_threshold()[0] == _HIGH_THRESHOLD:
                    gc.set_threshold(shared._usual_threshold, *gc.get_threshold()[1:])


class EngineThread:
    """Runs an engine in a daemon thread.

    Args:
        engine: taken over; nobody else may touch it from now on.

    Attributes:
        last_progress: `time.monotonic()` of the last finished step, or of the last moment
            without work.
        kv_cache_usage: share of the KV cache that requests held after the last step, 0 to 1.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[Request, RequestStream] = {}
        self._lock = threading.Lock()  # orders commands against the end of the thread
        self._end: BaseException | None = None  # why no more commands are taken
        self._pid = os.getpid()
        self.last_progress = time.monotonic()
        self.kv_cache_usage = 0.0
        self._thread = threading.Thread(target=self._run, name="nbllm-engine", daemon=True)
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """EngineDeadError or EngineClosedError once the engine takes no more requests."""
        if os.getpid() != self._pid:  # a fork copies no threads, and maybe locks that are taken
            return EngineDeadError(
                "this LLM belongs to the process that forked this one; start processes by 'spawn' "
                "and make an LLM there"
            )
        return self._end

    def is_healthy(self, stuck_after_s: float = 5.0) -> bool:
        """True if the engine lives and its steps make progress, not merely if a thread exists."""
        engine = self._engine
        if self.error is not None or engine is None:
            return False
        stuck = time.monotonic() - self.last_progress > stuck_after_s
        return not (stuck and engine.has_requests)

    def submit(self, requests: Sequence[Request], stream: RequestStream) -> None:
        """Run `requests`; what happens to them is told to `stream`.

        Raises:
            EngineClosedError, EngineDeadError: no requests are taken any more.
        """

        def add() -> None:
            assert self._engine is not None
            for request in requests:
                self._streams[request] = stream
                self._engine.add(request)

        release_threads()  # the caller's, who is about to wait
        self._send(add)

    def abort(self, requests: Sequence[Request]) -> None:
        """End those of `requests` that are not finished. Returns at once; never raises."""

        def abort() -> None:
            assert self._engine is not None
            self._deliver(self._engine.abort(r for r in requests if r in self._streams))

        try:
            self._send(abort)
        except (EngineClosedError, EngineDeadError):
            pass  # they ended with the engine

    def call(self, function: Callable[[Engine], T], timeout_s: float | None = None) -> T:
        """Run `function(engine)` between two steps and return its result.

        Raises:
            TimeoutError: no step ended within `timeout_s`; None waits as long as it takes.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        # Not a Future: an interrupt of its reader can leave its lock taken, see `RequestStream`.
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            assert self._engine is not None
            try:
                results.append(function(self._engine))
            except BaseException as error:
                errors.append(error)
            done.put(None)

        self._send(run)
        while True:  # wakes now and then, so that the end of the thread is noticed
            try:
                done.get(timeout=max(min(0.5, deadline - time.monotonic()), 0.0))
                break
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"the engine was busy for {timeout_s} s") from None
                if self._end is not None and not self._thread.is_alive():
                    raise self._end from None
        if errors:
            raise errors[0]
        return results[0]

    def close(self, timeout_s: float = 30.0) -> None:
        """End all requests, free weights and KV cache, end the thread. Idempotent."""
        if os.getpid() != self._pid:
            return
        error = EngineClosedError("the engine is closed (LLM.close() was called); make a new LLM")
        with self._lock:
            if self._end is None:
                self._end = error
            self._inbox.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _send(self, command: _Command) -> None:
        error = self.error
        if error is not None:
            raise error
        with self._lock:
            if self._end is not None:
                raise self._end
            self._inbox.put(command)

    def _run(self) -> None:
        engine = self._engine
        assert engine is not None
        interpreter = _BusyInterpreter()
        try:
            while self._end is None:
                try:
                    is_idle = not engine.has_requests
                    if is_idle:
                        self.kv_cache_usage = 0.0  # also after an abort, which is no step
                        interpreter.set(is_busy=False)
                        release_threads()
                    self._run_commands(wait=is_idle)
                    interpreter.set(is_busy=engine.has_requests)
                    if self._end is None and engine.has_requests:
                        self._deliver(engine.step())
                        blocks = engine.block_manager
                        self.kv_cache_usage = 1 - blocks.num_free_blocks / blocks.num_usable_blocks
                        self.last_progress = time.monotonic()
                except EngineDeadError:
                    raise
                except BaseException as error:  # a bug outside of a step: nobody may hang on it
                    logger.exception("the engine's thread failed; all its requests end")
                    self._fail_all(engine, error)
        except BaseException as error:
            self._end = error
        finally:
            interpreter.set(is_busy=False)
            self._shut_down(engine)

    def _run_commands(self, *, wait: bool) -> None:
        """Run what is in the inbox by now; with `wait`, sleep until there is something.

        What is sent meanwhile waits for a step: a call sends its rows by the hundred, and the
        device can begin with the first of them.
        """
        for _ in range(max(self._inbox.qsize(), int(wait))):
            command = self._inbox.get()
            self.last_progress = time.monotonic()
            command()

    def _deliver(self, changed: Sequence[Request]) -> None:
        """Tell the streams of the requests that changed; forget those that finished."""
        told: dict[RequestStream, list[Request]] = {}
        for request in changed:
            stream = self._streams.get(request)
            if stream is None:
                continue
            if request.is_finished:
                del self._streams[request]
            elif not request.streaming:
                continue
            told.setdefault(stream, []).append(request)
        for stream, requests in told.items():
            stream.put(requests)

    def _fail_all(self, engine: Engine, error: BaseException) -> None:
        engine.fail_all(error)
        for request in self._streams:
            if not request.is_finished:  # it never got as far as the scheduler
                request.error = error
                request.finish(FinishReason.ERROR)
        self._deliver(list(self._streams))

    def _shut_down(self, engine: Engine) -> None:
        """Fail what is left, in the inbox too, and let go of everything large."""
        with self._lock:
            assert self._end is not None
            error = self._end
        self._run_commands(wait=False)
        self._fail_all(engine, error)
        self._engine = None
        engine.release()
