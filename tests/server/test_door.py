"""Who is let in, with how much, and how many at a time."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from nbllm import LLM, InvalidRequestError
from nbllm.errors import EngineClosedError, EngineDeadError, RequestFailedError
from nbllm.server import connection, door
from nbllm.server.app import make_app
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
BODY = {"prompt": "a", "max_tokens": 1}


def test_every_route_but_health_needs_the_key(llm: LLM, send: Send, server: Server) -> None:
    app = make_app(llm, api_key="key", hosts=None, model_name="x").app
    routes = [(route.path, method) for route in app.routes for method in route.methods]
    assert len(routes) > 10
    for path, method in routes:
        if method != "HEAD":
            status, _, _ = send(server, method, path, headers={"Authorization": None})
            assert status == (200 if path == "/health" else 401), path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer {key}"}, 200),
        ({"Authorization": "bearer {key}"}, 200),
        ({"X-API-Key": "{key}", "Authorization": None}, 200),
        ({"X-API-Key": "{key}", "Authorization": "token of-the-hub"}, 200),
        ({"Authorization": "Basic {key}"}, 401),
        ({"Authorization": "{key}"}, 401),
        ({"Authorization": "Bearer {key}x"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer \xff"}, 401),
        ({"X-API-Key": "", "Authorization": None}, 401),
    ],
)
def test_the_key_may_be_in_either_header(
    send: Send, server: Server, headers: dict[str, str | None], status: int
) -> None:
    named = {
        name: value and value.replace("{key}", server.api_key or "")
        for name, value in headers.items()
    }
    assert send(server, "GET", "/v1/models", headers=named)[0] == status


def test_several_keys_may_be_given(llm: LLM, send: Send) -> None:
    with llm.serve(api_key=["first", "second"]) as server:
        assert server.api_key == "first"
        for key, status in (("first", 200), ("second", 200), ("third", 401)):
            headers = {"X-API-Key": key, "Authorization": None}
            assert send(server, "GET", "/v1/models", headers=headers)[0] == status


@pytest.mark.parametrize("api_key", ["", " ", [], ["a", ""], "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(llm: LLM, api_key: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.serve(api_key=api_key)
    assert caught.value.parameter == "api_key"


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        ({}, "localhost", 200),
        ({}, "LOCALHOST:1", 200),
        ({}, "[::1]:8000", 200),
        ({}, "evil.example", 403),
        ({}, "127.0.0.1.evil.example", 403),
        ({}, "", 403),
        ({"allowed_hosts": ["nb.example"]}, "nb.example:80", 200),
        ({"allowed_hosts": ["nb.example"]}, "127.0.0.1", 200),
        ({"allowed_hosts": ["nb.example"]}, "evil.example", 403),
        ({"allowed_hosts": ["*"]}, "evil.example", 200),
        ({"host": "0.0.0.0"}, "any.example", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ["nb.example"]}, "any.example", 403),
    ],
)
def test_the_name_in_host_must_be_known(
    llm: LLM, send: Send, options: dict[str, Any], host: str, status: int
) -> None:
    with llm.serve(**options) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert send(server, "GET", "/version", headers={"Host": host})[0] == status
        assert send(server, "GET", "/health", headers={"Host": host})[0] == status


def test_behind_a_hub_any_name_is_let_in_that_has_the_key(
    llm: LLM, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    with llm.serve() as server:
        assert server.proxy_path == f"/user/ada/proxy/{server.port}/"
        assert send(server, "GET", "/version", headers={"Host": "hub.example"})[0] == 200
    with llm.serve(api_key=None) as server:
        assert send(server, "GET", "/version", headers={"Host": "hub.example"})[0] == 403


def test_a_large_body_is_refused_by_its_announced_length(server: Server) -> None:
    request = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.api_key}\r\nContent-Length: {50 << 20}\r\n"
        "Expect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(request.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")  # nothing of the body was sent


def test_a_large_body_of_unknown_length_is_refused(server: Server) -> None:
    raw = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
    pieces = (b"a" * (1 << 20) for _ in range(10))
    raw.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    reply = raw.getresponse()
    assert reply.status == 413
    assert json.loads(reply.read())["error"]["message"]
    raw.close()


def test_a_body_that_does_not_come_ends(
    send: Send, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "BODY_TIMEOUT_S", 0.02)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            b"Content-Type: application/json\r\n"
            b"Authorization: Bearer " + (server.api_key or "").encode() + b"\r\n\r\n{"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("head", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.02)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(head)
        assert raw.recv(100) == b""


def test_a_connection_is_used_again_and_its_second_head_must_come_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.5)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        for _ in range(3):
            raw.sendall(request)
            assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
        raw.sendall(request[:9])
        assert raw.recv(100) == b""


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}",
        b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
        b'{"prompt": "a", "stream_options": {"include_usage": "yes"}}',
        b'{"prompt": "a\xff"}',
        b'{"prompt": "a", "stop": ["\\ud800"]}',
        b'{"prompt": "a", "bad_words": ["\\ud800"]}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "logit_bias": {"-1": 1}}',
        b'{"prompt": "a", "logit_bias": {"1": null}}',
        b'{"prompt": "a", "stop_token_ids": [-1]}',
        b'{"prompt": "a", "allowed_token_ids": []}',
        b'{"prompt": ["a", 1]}',
        b'{"prompt": [[1], "a"]}',
        b'{"prompt": [true]}',
        b'{"prompt": ""}',
        b'{"prompt": "a", "structured_outputs": {"json": 5}}',
        b'{"prompt": "a", "response_format": 5}',
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_no_body_makes_the_server_fail(send: Send, server: Server, route: str, body: bytes) -> None:
    status, _, reply = send(server, "POST", route, body)
    assert status in ((400, 404) if route != "/tokenize" else (200, 400, 404)), reply
    if status != 200:
        assert reply["error"]["message"]
        assert len(json.dumps(reply)) < 700


def test_past_a_bound_requests_are_told_to_come_again(llm: LLM, send: Send) -> None:
    with llm.serve(max_concurrent_requests=1) as server, server.client() as client:
        stream = client.completions.create(
            model="nbllm-demo",
            prompt="a",
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        status, headers, reply = send(server, "POST", "/v1/completions", BODY)
        assert status == 429
        assert int(headers["retry-after"]) > 0
        assert reply["error"]["code"] == 429
        assert send(server, "GET", "/load")[2] == {"server_load": 1}
        assert send(server, "GET", "/health")[0] == 200
        stream.close()
        for _ in range(2_000):  # until the server has noticed
            if send(server, "POST", "/v1/completions", BODY)[0] == 200:
                break
        assert send(server, "GET", "/load")[2] == {"server_load": 0}


def out_of_memory() -> RequestFailedError:
    error = RequestFailedError("a step of the engine failed: in /a/secret/path")
    error.__cause__ = MemoryError("no room")
    return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (out_of_memory(), 503),
        (RequestFailedError("a step of the engine failed: in /a/secret/path"), 500),
        (EngineDeadError("cuda in /a/secret/path"), 503),
        (EngineClosedError("closed in /a/secret/path"), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_has_a_status_for_each_reason(
    llm: LLM,
    send: Send,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    stream: bool,
) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise error
        yield

    monkeypatch.setattr(llm, "astream", fail)
    got, headers, reply = send(server, "POST", "/v1/completions", BODY | {"stream": stream})
    assert got == status
    assert ("retry-after" in headers) == (status == 503)
    assert reply["error"]["type"] == "server_error"
    assert "secret" not in reply["error"]["message"]


def test_an_error_inside_a_stream_is_an_event_and_the_stream_ends(
    llm: LLM, send: Send, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    astream = llm.astream

    async def fail(*args: Any, **options: Any) -> Any:
        async for output in astream(*args, **options):
            yield output
            raise out_of_memory()

    monkeypatch.setattr(llm, "astream", fail)
    body = BODY | {"stream": True, "max_tokens": 50, "ignore_eos": True}
    status, _, text = send(server, "POST", "/v1/completions", body)
    assert status == 200
    *_, last, done = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert json.loads(last)["error"]["code"] == 503
    assert done == "[DONE]"


def test_a_closed_engine_is_not_healthy(send: Send) -> None:
    llm = LLM(device="cpu")
    with llm.serve() as server:
        assert send(server, "GET", "/health", headers={"Authorization": None})[0] == 200
        llm._finalizer()
        assert send(server, "GET", "/health", headers={"Authorization": None})[0] == 503
        assert send(server, "GET", "/metrics")[0] == 503
        assert send(server, "POST", "/v1/completions", BODY)[0] == 503
    assert not server.is_running
