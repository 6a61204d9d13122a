"""Servers come and go: nothing is left of them, and what runs is ended in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import pytest

import nbllm
from nbllm import LLM, EngineDeadError, InvalidRequestError, NbllmError
from nbllm.llm import last_created_llm
from nbllm.server.log_lines import LogLines, describe

Send = Callable[..., tuple[int, dict[str, str], Any]]
BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 3, "ignore_eos": True}
LONG = BODY | {"max_tokens": 900, "stream": True}

FILES = Path("/proc/self/fd")
needs_proc = pytest.mark.skipif(not FILES.is_dir(), reason="needs /proc")


def left() -> tuple[int, set[threading.Thread]]:
    """How many files this process has open, and its threads."""
    gc.collect()
    return len(os.listdir(FILES)), set(threading.enumerate())


@needs_proc
@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_serving_and_stopping_leaves_neither_threads_nor_files(
    llm: LLM, send: Send, times: int
) -> None:
    def serve_once() -> None:
        with llm.serve() as server:
            assert send(server, "POST", "/v1/completions", BODY)[0] == 200
            assert send(server, "GET", "/metrics")[0] == 200  # a thread of the loop answers it

    serve_once()  # what is made once and kept
    before = left()
    for _ in range(times):
        serve_once()
    assert left() == before
    assert len(llm._servers) <= 1


def test_a_port_in_use_is_a_clear_error(llm: LLM) -> None:
    with llm.serve() as server:
        with pytest.raises(InvalidRequestError, match=f"{server.port} can't be bound") as caught:
            llm.serve(port=server.port)
        assert caught.value.parameter == "port"
        with pytest.raises(InvalidRequestError):
            nbllm.serve(llm, port=server.port)


def test_two_servers_of_one_llm_answer_at_a_time(llm: LLM, send: Send) -> None:
    with llm.serve(model_name="one") as one, llm.serve(model_name="two") as two:
        replies: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda server: replies.append(send(server, "POST", "/v1/completions", BODY)),
                args=(server,),
            )
            for server in (one, two)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {reply["model"] for _, _, reply in replies} == {"one", "two"}
        one.stop()
        assert send(two, "POST", "/v1/completions", BODY)[0] == 200
        assert len(one.requests()) == 1


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_runs_when_the_server_stops_ends_in_order(llm: LLM, route: str) -> None:
    server = llm.serve()
    body = {**LONG, "messages": [{"role": "user", "content": "Hi"}]}
    del body["prompt" if "chat" in route else "messages"]
    headers = {"X-API-Key": server.api_key or ""}
    with httpx.stream("POST", server.url + route, json=body, headers=headers) as reply:
        lines = reply.iter_lines()
        first = next(lines)
        server.stop(timeout_s=0)
        rest = [line for line in lines if line]  # no error: the body is complete
    assert first.startswith("data: {")
    assert "the server stops" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert llm.get_metrics()["num_requests_running"] == 0
    assert "the server stops" in server.logs()[-2]
    assert not server.is_running


# -- other processes ------------------------------------------------------------------------------


def use_after_fork(llm: LLM, pipe: Connection) -> None:
    """What a child may try with its parent's `LLM`; tells the parent what it got."""
    tries: list[Callable[[], Any]] = [
        lambda: llm.generate("a"),
        lambda: next(llm.stream("a")),
        llm.get_metrics,
        llm.serve,
    ]
    for attempt in tries:
        try:
            pipe.send(repr(attempt()))
        except BaseException as error:
            pipe.send(error)
    pipe.send(llm.is_healthy())
    llm.close()  # must not hang, or end the parent's
    pipe.send("closed")
    pipe.recv()  # lives on, with the parent's files


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_gets_an_error_and_keeps_nothing_from_its_parent(
    llm: LLM, send: Send
) -> None:
    server = llm.serve()
    context = multiprocessing.get_context("fork")
    pipe, childs_pipe = context.Pipe()
    child = context.Process(target=use_after_fork, args=(llm, childs_pipe), daemon=True)
    child.start()
    try:
        got = []
        for _ in range(6):
            assert pipe.poll(30), "the child hangs"
            got.append(pipe.recv())
        assert all(isinstance(error, EngineDeadError) for error in got[:4]), got
        assert "spawn" in str(got[0])
        assert got[4:] == [False, "closed"]
        server.stop()
        server.restart()  # the child had the port's socket, too
        assert send(server, "POST", "/v1/completions", BODY)[0] == 200
        server.stop()
        pipe.send("end")
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
        server.stop()


CELL = """
from nbllm import LLM
llm = LLM(device="cpu")
server = llm.serve(port={port}, api_key="key")
reply = server.client().completions.create(model="nbllm-demo", prompt="Hi", max_tokens=900,
                                           stream=True, extra_body={{"ignore_eos": True}})
next(iter(reply))
print(server.port)
"""


@pytest.mark.slow
def test_after_a_restart_of_its_kernel_a_cell_serves_on_the_same_port() -> None:
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    port = 0
    try:
        for _ in range(3):  # each restart comes in the middle of a stream
            client = manager.client()
            client.start_channels()
            client.wait_for_ready(timeout=60)
            printed: list[str] = []
            reply = client.execute_interactive(
                CELL.format(port=port),
                timeout=60,
                output_hook=lambda message, printed=printed: printed.append(
                    message["content"].get("text", "")
                ),
            )
            assert reply["content"]["status"] == "ok", reply["content"]
            port, last_port = int("".join(printed)), port
            assert last_port in (0, port)
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            client.stop_channels()
            manager.restart_kernel(now=True)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{port}/health")
    finally:
        manager.shutdown_kernel(now=True)


# -- nbllm.serve ----------------------------------------------------------------------------------


def test_an_llm_is_served_and_stays_open(llm: LLM, send: Send) -> None:
    with nbllm.serve(llm, model_name="mine") as server:
        assert send(server, "GET", "/v1/models")[2]["data"][0]["id"] == "mine"
    assert llm.is_healthy()
    server.restart()
    server.stop()


def test_without_a_name_the_default_llm_is_served(llm: LLM, send: Send) -> None:
    nbllm.set_default_llm(llm)
    try:
        with nbllm.serve() as server:
            assert server in llm._servers
            assert send(server, "POST", "/v1/completions", BODY)[0] == 200
    finally:
        nbllm.set_default_llm(None)
    assert llm.is_healthy()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_that_is_named_is_closed_with_its_server(kind: Any, send: Send) -> None:
    folder = kind(Path(nbllm.__file__).parent / "demo")
    server = nbllm.serve(folder, model_name="named")
    llm = last_created_llm()
    assert llm is not None
    assert send(server, "POST", "/v1/completions", BODY)[0] == 200
    server.restart()  # it is not closed in between
    assert send(server, "POST", "/v1/completions", BODY)[0] == 200
    server.stop()
    server.stop()
    assert not llm.is_healthy()
    with pytest.raises(NbllmError, match=r"nbllm\.serve\(\) again"):
        server.restart()


def test_a_named_model_is_closed_if_it_can_not_be_served() -> None:
    folder = Path(nbllm.__file__).parent / "demo"
    before = threading.active_count()
    with pytest.raises(InvalidRequestError):
        nbllm.serve(folder, port=-1)
    assert threading.active_count() == before


def test_an_option_that_there_is_not_is_found_before_a_model_is_loaded() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        nbllm.serve("no/such/model", no_such_option=1)


@pytest.mark.parametrize("wrong", [5, b"name", ["name"]])
def test_what_is_neither_llm_nor_name_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        nbllm.serve(wrong)
    assert caught.value.parameter == "llm_or_name"


# -- the log --------------------------------------------------------------------------------------


def test_the_log_has_a_line_for_each_request(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        reply = send(server, "POST", "/v1/completions", BODY)[2]
        send(server, "POST", "/v1/completions", BODY | {"temperature": -1})
        send(server, "GET", "/v1/models", headers={"Authorization": None})
        send(server, "GET", "/health")
    started, good, wrong, closed, stopped = server.logs()
    assert started.endswith(f"started on {server.base_url}")
    assert f"{reply['id']} /v1/completions 200 " in good
    assert f"{reply['usage']['prompt_tokens']}+3 tokens" in good
    assert " 400 " in wrong and "InvalidRequestError: " in wrong and "temperature" in wrong
    assert "/v1/models 401 " in closed
    assert stopped.endswith("stopped")
    assert server.logs(2) == [closed, stopped]
    assert server.logs(0) == []
    assert not any(server.api_key in line for line in server.logs() if server.api_key)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_is_logged_with_its_cause(
    llm: LLM, send: Send, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    astream = llm.astream

    async def fail(*args: Any, **options: Any) -> Any:
        async for output in astream(*args, **options):
            yield output
            raise NbllmError("a step failed") from ZeroDivisionError("by zero")

    monkeypatch.setattr(llm, "astream", fail)
    with llm.serve() as server, llm.serve() as other:
        send(server, "POST", "/v1/completions", BODY | {"stream": stream, "max_tokens": 9})
    line = server.logs()[-2]  # the last one tells of the stop
    assert "NbllmError: a step failed, because of ZeroDivisionError: by zero" in line
    assert len(other.logs()) == 2


def test_a_client_can_not_write_lines_of_its_own(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        send(server, "GET", "/a%0a2026-01-01%20stopped%1b[2J")
    assert len(server.logs()) == 3
    assert "\\n2026" in server.logs()[1]


def test_the_log_is_bounded() -> None:
    lines = LogLines(max_lines=3)
    for number in range(10):
        lines.add(str(number))
    assert [line[-1] for line in lines.tail(200)] == ["7", "8", "9"]
    with pytest.raises(InvalidRequestError) as caught:
        lines.tail(-1)
    assert caught.value.parameter == "n"


def test_an_error_that_causes_itself_is_described_too() -> None:
    error = ValueError("x" * 9_000)
    error.__cause__ = error
    assert len(describe(error)) < 3_000
