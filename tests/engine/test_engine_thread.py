"""EngineThread: nobody hangs on it, whatever happens to it."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import EngineClosedError, EngineDeadError
from nbllm.engine.engine import Engine
from nbllm.engine.engine_thread import EngineThread, _BusyInterpreter
from nbllm.engine.request import FinishReason, Request
from nbllm.engine.request_stream import RequestStream

MakeRequest = Callable[..., Request]


@pytest.fixture
def thread(make_engine: Callable[..., Engine]) -> Iterator[EngineThread]:
    thread = EngineThread(make_engine())
    yield thread
    thread.close()


def read_all(stream: RequestStream, request: Request) -> None:
    while not request.is_finished:
        stream.take(timeout_s=10)


def test_a_request_reports_to_its_stream(thread: EngineThread, make_request: MakeRequest) -> None:
    request, stream = make_request([1, 2, 3]), RequestStream()
    thread.submit([request], stream)
    read_all(stream, request)
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_output_tokens == 8


def test_an_aborted_request_is_reported_too(
    thread: EngineThread, make_request: MakeRequest
) -> None:
    request, stream = make_request([1, 2, 3], max_tokens=200), RequestStream()
    thread.submit([request], stream)
    thread.abort([request])
    read_all(stream, request)
    assert request.finish_reason is FinishReason.ABORT


def test_a_call_that_raises_raises_at_its_caller_only(
    thread: EngineThread, make_request: MakeRequest
) -> None:
    def broken(_: Engine) -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        thread.call(broken)
    request, stream = make_request([1, 2, 3]), RequestStream()
    thread.submit([request], stream)
    read_all(stream, request)


def test_closing_ends_waiting_readers_with_the_reason(
    thread: EngineThread, make_request: MakeRequest
) -> None:
    request, stream = make_request([1, 2, 3], max_tokens=240), RequestStream()
    thread.submit([request], stream)
    thread.close()
    read_all(stream, request)
    assert isinstance(request.error, EngineClosedError)
    with pytest.raises(EngineClosedError):
        thread.submit([make_request([1])], RequestStream())
    with pytest.raises(EngineClosedError):
        thread.call(lambda engine: engine.metrics())
    assert not thread._thread.is_alive()


def test_a_device_that_is_lost_ends_everything_with_its_cause(
    thread: EngineThread, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError("device-side assert")

    def broken(*_: Any) -> Any:
        raise lost

    monkeypatch.setattr("nbllm.engine.engine._is_device_dead", lambda runner, error: True)
    thread.call(lambda engine: monkeypatch.setattr(engine.runner, "launch", broken))
    request, stream = make_request([1, 2, 3]), RequestStream()
    thread.submit([request], stream)
    read_all(stream, request)
    assert isinstance(request.error, EngineDeadError)
    assert request.error.__cause__ is lost
    assert isinstance(thread.error, EngineDeadError)
    assert not thread.is_healthy()
    with pytest.raises(EngineDeadError):
        thread.submit([make_request([1])], RequestStream())


def test_a_step_that_is_stuck_is_not_healthy(
    thread: EngineThread, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()

    def install(engine: Engine) -> None:
        execute = engine.runner.launch

        def wait_then_execute(output: Any) -> Any:
            entered.set()
            release.wait(30)
            return execute(output)

        monkeypatch.setattr(engine.runner, "launch", wait_then_execute)

    thread.call(install)
    assert thread.is_healthy(stuck_after_s=0.0)
    request, stream = make_request([1, 2, 3]), RequestStream()
    thread.submit([request], stream)
    entered.wait(30)
    assert thread.is_healthy(stuck_after_s=3600)
    assert not thread.is_healthy(stuck_after_s=0.0)
    release.set()
    read_all(stream, request)


def test_many_threads_submit_and_abort_at_once(
    thread: EngineThread, make_request: MakeRequest
) -> None:
    finished: list[Request] = []

    def work(number: int) -> None:
        for i in range(8):
            request, stream = make_request([number + 2, i + 2], max_tokens=6), RequestStream()
            thread.submit([request], stream)
            if i % 3 == 0:
                thread.abort([request])
            read_all(stream, request)
            finished.append(request)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(finished) == 64
    assert thread.call(lambda engine: engine.metrics())["num_requests_running"] == 0


def interpreter() -> tuple[float, tuple[int, ...]]:
    return sys.getswitchinterval(), gc.get_threshold()


def test_the_interpreter_switches_fast_and_collects_late_while_some_engine_works() -> None:
    usual = interpreter()
    first, second = _BusyInterpreter(), _BusyInterpreter()
    for engine, is_busy in ((first, True), (second, True), (first, False), (second, False)):
        was_busy = engine is not first or not is_busy
        assert (sys.getswitchinterval() < usual[0]) == was_busy
        assert (gc.get_threshold() > usual[1]) == was_busy
        engine.set(is_busy=is_busy)
        engine.set(is_busy=is_busy)  # said twice, counted once
    assert interpreter() == usual


def test_what_the_user_has_set_meanwhile_stays() -> None:
    usual = interpreter()
    engine = _BusyInterpreter()
    engine.set(is_busy=True)
    sys.setswitchinterval(0.01)
    gc.set_threshold(900, 8, 7)
    engine.set(is_busy=False)
    try:
        assert interpreter() == (0.01, (900, 8, 7))
    finally:
        sys.setswitchinterval(usual[0])
        gc.set_threshold(*usual[1])


def test_a_collector_that_is_off_stays_off() -> None:
    usual = gc.get_threshold()
    gc.set_threshold(0)
    engine = _BusyInterpreter()
    try:
        engine.set(is_busy=True)
        assert gc.get_threshold()[0] == 0
        engine.set(is_busy=False)
        assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*usual)


def test_an_engine_that_is_done_leaves_the_interpreter_as_it_was(
    thread: EngineThread, make_request: MakeRequest
) -> None:
    usual = interpreter()
    request, stream = make_request([1, 2, 3]), RequestStream()
    thread.submit([request], stream)
    read_all(stream, request)
    thread.close()
    assert interpreter() == usual
