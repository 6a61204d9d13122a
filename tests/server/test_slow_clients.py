"""Clients that read slowly, or send slowly, or stay: nobody else notices them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from nbllm import LLM, SamplingParams
from nbllm.server import connection
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
NUM_TOKENS = 180
BULKY: dict[str, Any] = {  # two kilobytes of log-probabilities with every token
    "prompt": "Once upon a time",
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 20,
    "stream": True,
}
BODY: dict[str, Any] = {"prompt": "What is 17 + 25?", "max_tokens": 4, "temperature": 0}
FULL_BUFFER = 64 << 10  # where the event loop stops a writer


def head_of(server: Server, length: int) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.api_key}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def connect(server: Server) -> socket.socket:
    """A socket whose buffer is as small as the system lets it be."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(90)
    raw.connect(("127.0.0.1", server.port))
    return raw


def ask(server: Server, body: dict[str, Any]) -> socket.socket:
    """A client that has sent its request and does not read."""
    raw = connect(server)
    sent = json.dumps(body).encode()
    raw.sendall(head_of(server, len(sent)) + sent)
    return raw


def read_events(raw: socket.socket) -> list[dict[str, Any]]:
    reply = http.client.HTTPResponse(raw)
    reply.begin()
    assert reply.status == 200
    *events, end = reply.read().decode().strip().split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def running(llm: LLM) -> float:
    return llm.get_metrics()["num_requests_running"]


def connections_of(server: Server) -> list[Any]:
    return list(server._server.server_state.connections)


def is_stalled(server: Server) -> bool:
    return any(not c.flow._is_writable_event.is_set() for c in connections_of(server) if c.flow)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_model_len=512) as llm:
        yield llm


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    with llm.serve() as server:
        # The system's own buffer, which clients' sockets inherit, holds megabytes otherwise.
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        yield server


def test_a_reader_that_pauses_gets_all_of_it_in_fewer_events(llm: LLM, server: Server) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    (expected,) = llm.generate(BULKY["prompt"], params)
    with ask(server, BULKY) as raw:
        wait_until(lambda: is_stalled(server))
        assert running(llm) == 1
        wait_until(lambda: running(llm) == 0)  # the engine does not wait for readers
        assert is_stalled(server)
        sizes = [c.transport.get_write_buffer_size() for c in connections_of(server)]
        assert max(sizes) < 2 * FULL_BUFFER
        events = read_events(raw)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == expected.outputs[0].text
    counts = [len(choice["logprobs"]["tokens"]) for choice in choices]
    assert sum(counts) == NUM_TOKENS
    assert max(counts) > 10  # what came meanwhile is one event


@pytest.mark.parametrize("num_slow", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_others_are_served_beside_slow_readers(llm: LLM, server: Server, num_slow: int) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(ask(server, BULKY)) for _ in range(num_slow)]
        wait_until(lambda: is_stalled(server))
        for _ in range(3):
            with ask(server, BODY | {"stream": True}) as raw:
                text = "".join(event["choices"][0]["text"] for event in read_events(raw))
            assert text.strip() == "42"
        wait_until(lambda: running(llm) == 0)
        sizes = [c.transport.get_write_buffer_size() for c in connections_of(server)]
        assert sum(sizes) < 2 * FULL_BUFFER * num_slow
        for raw in slow[::5]:
            assert len(read_events(raw)) > 1
    wait_until(lambda: server.stats.num_running == 0)
    assert llm.get_metrics()["kv_cache_usage_perc"] == 0.0


def test_a_reader_that_never_reads_is_let_go(
    llm: LLM, server: Server, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.05)
    with ask(server, BULKY):
        wait_until(lambda: server.stats.num_requests == 1)
        assert server.stats.num_running == 0
        assert running(llm) == 0
    assert send(server, "POST", "/v1/completions", BODY)[0] == 200


def test_a_reader_may_be_slow_for_as_long_as_it_reads(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ask(server, BULKY) as raw:
        wait_until(lambda: is_stalled(server))
        assert all(c._stall_timer is not None for c in connections_of(server))
        events = read_events(raw)
        assert all(c._stall_timer is None for c in connections_of(server))
        assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("num_slow", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_heads_that_come_letter_by_letter_hold_nobody_up(
    server: Server, send: Send, monkeypatch: pytest.MonkeyPatch, num_slow: int
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 1.0)
    letters = iter(head_of(server, 10))
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(server)) for _ in range(num_slow)]
        for letter in [next(letters) for _ in range(10)]:
            for raw in slow:
                raw.sendall(bytes([letter]))
            assert send(server, "POST", "/v1/completions", BODY)[0] == 200
        for raw in slow:  # each letter does not begin the time anew
            assert raw.recv(100) == b""
    wait_until(lambda: not connections_of(server))


# -- connections that stay ------------------------------------------------------------------------

# Route, body, status: also what is refused must leave its connection usable.
KEPT: list[tuple[str, str, bytes | None, int]] = [
    ("POST", "/v1/completions", json.dumps(BODY | {"max_tokens": 1}).encode(), 200),
    ("POST", "/v1/completions", json.dumps(BODY | {"stream": True, "max_tokens": 2}).encode(), 200),
    ("POST", "/v1/completions", b"{", 400),
    ("POST", "/v1/completions", b" " * (9 << 20), 413),
    ("POST", "/no/such/route", b"{}", 404),
    ("GET", "/v1/models", None, 200),
    ("GET", "/health", None, 200),
    ("GET", "/v1/completions", None, 405),
]


def check_kept(server: Server, num_requests: int, num_connections: int) -> None:
    """Requests over connections that stay open; raises if the server closes one of them."""
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    failures: list[BaseException] = []

    def work(number: int) -> None:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        client.connect()
        client.auto_open = 0  # else it would connect again in silence
        try:
            for count in range(num_requests // num_connections):
                method, route, body, status = KEPT[(number + count) % len(KEPT)]
                client.request(method, route, body, headers)
                reply = client.getresponse()
                got = reply.read()
                assert reply.status == status, got[:300]
        except BaseException as error:
            failures.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("num_requests", [80, pytest.param(2_000, marks=pytest.mark.slow)])
def test_connections_stay_whatever_is_asked(server: Server, num_requests: int) -> None:
    check_kept(server, num_requests, num_connections=10)
    assert server.stats.num_requests == num_requests * 7 // 8  # /health is not counted


def test_a_connection_that_was_idle_is_still_there(server: Server) -> None:
    from nbllm.server.handle import _KEEP_ALIVE_S

    assert server._server.config.timeout_keep_alive == _KEEP_ALIVE_S
    assert _KEEP_ALIVE_S > 60  # what clients and proxies keep theirs for
