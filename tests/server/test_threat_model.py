"""What another program, another user or a web page could try against a server on this machine."""

from __future__ import annotations

import hmac
import json
import logging
import pprint
import socket
from collections.abc import Callable
from typing import Any

import openai
import pytest
from IPython.core.formatters import DisplayFormatter

from nbllm import LLM, InvalidRequestError
from nbllm.server import door
from nbllm.server.app import make_app
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
BODY = {"prompt": "a", "max_tokens": 1}
PAGE = "https://evil.example"


def routes_of(llm: LLM) -> list[tuple[str, str]]:
    """(path, method) of every route that the application has."""
    app = make_app(llm, api_key="key", hosts=None, model_name="x").app
    return [(route.path, method) for route in app.routes for method in sorted(route.methods)]


def raw(server: Server, request: str) -> bytes:
    """What comes back for bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode("latin-1"))
        with connection.makefile("rb") as reply:
            return reply.read()


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


# -- who may come in ------------------------------------------------------------------------------


def test_by_default_only_this_machine_reaches_it_and_needs_a_key(llm: LLM) -> None:
    with llm.serve() as one, llm.serve() as other:
        (listener,) = one._server.servers[0].sockets
        assert listener.getsockname() == ("127.0.0.1", one.port)
        keys = {one.api_key, other.api_key}
    assert len(keys) == 2
    assert all(key is not None and len(key) >= 32 for key in keys)


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ODD"]
)
def test_no_method_of_any_route_is_answered_without_the_key(
    llm: LLM, send: Send, server: Server, method: str
) -> None:
    paths = {path for path, _ in routes_of(llm)} - {"/health"}
    assert len(paths) > 12
    for path in paths:
        status, _, reply = send(server, method, path, headers={"Authorization": None})
        assert status == 401, path
        assert "error" in reply
        head = f"HEAD {path} HTTP/1.1\nHost: localhost\nConnection: close\n\n"
        assert method != "GET" or status_of(raw(server, head)) == 401


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "//health",
        "/HEALTH",
        "/./health",
        "/health/../v1/models",
        "/health;/v1/models",
        "/health%2f",
        "/v1/models?/health",
        "/v1/models#/health",
        "http://localhost/health/../v1/models",
    ],
)
def test_no_other_spelling_of_health_opens_the_door(server: Server, path: str) -> None:
    reply = raw(server, f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close\n\n")
    assert status_of(reply) in (400, 401)


def test_a_key_is_compared_in_constant_time_with_all_keys(
    llm: LLM, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return compare(given, known)

    monkeypatch.setattr(door.hmac, "compare_digest", note)
    with llm.serve(api_key=["first", "a much longer second key"]) as server:
        for key in ("first", "f", "a much longer second kez", "x" * 5000):
            compared.clear()
            send(server, "GET", "/version", headers={"Authorization": f"Bearer {key}"})
            assert len(compared) == 4  # of both headers, though the first has matched
            assert {len(side) for pair in compared for side in pair} == {32}  # whatever its length


def test_a_websocket_is_no_way_in(server: Server) -> None:
    upgrade = (
        "GET /v1/models HTTP/1.1\nHost: localhost\nUpgrade: websocket\nConnection: Upgrade\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\n\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(upgrade.replace("\n", "\r\n").encode())
        assert status_of(connection.recv(100)) == 401


# -- web pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "localhost.",
        "0.0.0.0",  # browsers took it for this machine
        "127.1",
        "2130706433",
        "[::ffff:127.0.0.1]",
        "localhost@evil.example",
        "localhost:evil.example",
        "evil.example:80, localhost",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/docs"])
def test_a_name_that_leads_here_from_elsewhere_is_refused(
    send: Send, server: Server, host: str, path: str
) -> None:
    status, _, reply = send(server, "GET", path, headers={"Host": host})
    assert status == 403
    assert "evil" not in json.dumps(reply)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET /v1/models HTTP/1.1\nConnection: close\n\n", 400),
        ("GET /v1/models HTTP/1.0\n\n", 403),
        ("GET /v1/models HTTP/1.1\nHost: localhost\nHost: evil.example\n\n", 400),
        (f"GET {PAGE}/v1/models HTTP/1.1\nHost: evil.example\nConnection: close\n\n", 403),
    ],
)
def test_a_name_that_is_missing_or_doubled_is_refused(
    server: Server, request_text: str, status: int
) -> None:
    head, _, rest = request_text.partition("\n")
    assert status_of(raw(server, f"{head}\nX-API-Key: {server.api_key}\n{rest}")) == status


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain; charset=application/json",
        "text/plain, application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json",
        "application/jsonp",
        "",
        None,
    ],
)
@pytest.mark.parametrize("has_key", [True, False])
def test_a_form_that_any_page_may_send_is_refused_by_every_route(
    llm: LLM, send: Send, kind: str | None, has_key: bool
) -> None:
    posts = [path for path, method in routes_of(llm) if method == "POST"]
    assert len(posts) > 6
    with llm.serve(api_key="auto" if has_key else None) as server:
        for path in posts:
            headers = {"Content-Type": kind, "Origin": PAGE}
            assert send(server, "POST", path, json.dumps(BODY).encode(), headers)[0] == 415, path
        assert server.stats.completion_tokens == 0


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_taken_however_it_is_written(send: Send, server: Server, kind: str) -> None:
    assert send(server, "POST", "/v1/completions", BODY, {"Content-Type": kind})[0] == 200


@pytest.mark.parametrize("has_key", [True, False])
def test_by_default_no_page_may_read_an_answer(llm: LLM, send: Send, has_key: bool) -> None:
    with llm.serve(api_key="auto" if has_key else None) as server:
        for path, method in routes_of(llm):
            preflight = {"Origin": PAGE, "Access-Control-Request-Method": method}
            asked = send(server, "OPTIONS", path, headers=preflight | {"Authorization": None})
            assert asked[0] in (401, 405), path
            answer = send(server, "GET", path, headers={"Origin": PAGE})
            for _, headers, _ in (asked, answer):
                assert not [name for name in headers if name.startswith("access-control")], path


# -- what is left lying about ---------------------------------------------------------------------


def test_nothing_that_a_notebook_saves_has_the_key_in_it(
    llm: LLM, send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    def shown(value: Any) -> list[str]:
        """All that a notebook stores for the value of a cell."""
        data, _ = DisplayFormatter().format(value)
        assert {"text/plain", "text/html"} <= data.keys()
        return [*data.values(), repr(value), str(value), pprint.pformat(value)]

    with caplog.at_level(logging.DEBUG, logger="nbllm"), llm.serve() as server:
        key = server.api_key
        assert key
        send(server, "POST", "/v1/completions", BODY)
        send(server, "POST", "/v1/completions", BODY, {"Authorization": f"Bearer {key}x"})
        send(server, "GET", f"/v1/models?api_key={key}")
        client = server.client(max_retries=0, api_key="wrong")
        with client, pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        with pytest.raises(InvalidRequestError) as in_use:
            llm.serve(port=server.port, api_key=key)
        texts = [*shown(server), *shown(server.requests()), repr(server.stats)]
        texts += [str(refused.value), str(in_use.value)]
        server.restart()
        texts += shown(server)
    texts += [*shown(server), *server.logs(), *caplog.messages]
    assert len(texts) > 25
    assert not [text for text in texts if key in text]


def test_a_wrong_key_is_not_repeated(send: Send, server: Server) -> None:
    given = {"X-API-Key": "almost right", "Authorization": "Bearer nearly"}
    _, headers, reply = send(server, "GET", "/version", headers=given)
    told = json.dumps([headers, reply])
    assert "almost" not in told
    assert "nearly" not in told
    assert not [line for line in server.logs() if "almost" in line or "nearly" in line]
