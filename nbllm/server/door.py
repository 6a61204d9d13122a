"""Door: what stands before every route of the server.

Whoever names another host (DNS rebinding), has no key, sends too much or comes when too many are
inside is turned away before a route sees the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware

from nbllm.request_source import request_source
from nbllm.server.errors import BodyTooLargeError, BodyTooSlowError, refusal
from nbllm.server.protocol import error_body, to_json
from nbllm.server.request_log import RequestLog, RequestRecord, note_error
from nbllm.server.service import RECORD

MAX_BODY_BYTES = 8 << 20
# A client sends all before it reads: it gets its answer if the rest is read too, up to a point.
MAX_DISCARDED_BYTES = 64 << 20
BODY_TIMEOUT_S = 60.0
OPEN_PATHS = frozenset({"/health"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Door:
    """ASGI middleware: Host, key, size of the body and number of requests are checked here.

    Args:
        app: what is behind it.
        log: gets a record of every request but those for `OPEN_PATHS`.
        api_keys: one of them must be in `Authorization: Bearer` or `X-API-Key`; empty lets
            everybody in.
        hosts: names under which the server may be addressed; None is any.
        max_concurrent_requests: POST requests that are answered at a time.
        root_path: under which a proxy shows the server; it may be left on a path or not.
        origins: of the web pages that may ask the server; their browsers' preflight requests are
            answered here, without a key.
        observe: told the route's path ("none" if none was reached), the method, the status and the
            seconds of every request that has a record.

    Attributes:
        app, log: the same.
    """

    def __init__(
        self,
        app: Any,
        log: RequestLog,
        *,
        api_keys: Collection[str],
        hosts: Collection[str] | None,
        max_concurrent_requests: int,
        root_path: str = "",
        origins: Collection[str] = (),
        observe: Callable[[str, str, int, float], None] | None = None,
    ) -> None:
        self.app = app
        self.log = log
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._hosts = hosts
        self._max_posts = max_concurrent_requests
        self._num_posts = 0
        self._root_path = root_path
        self._observe = observe
        self._entry: Any = self._enter if not origins else _for_browsers(self._enter, origins)

    @property
    def num_posts(self) -> int:
        """POST requests that are inside now."""
        return self._num_posts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no route takes a WebSocket
        scope["root_path"] = self._root_path
        if self._path(scope) in OPEN_PATHS:
            await self._entry(scope, receive, send)
            return
        record = self.log.begin(self._path(scope)[:200])
        scope[RECORD] = record
        request_source.set("server")  # each request has a task, hence a context, of its own
        reply = _Reply(record, send)
        try:
            await self._entry(scope, receive, reply.send)
        except asyncio.CancelledError:  # the server stops, and the request has had its time
            record.error = _STOPS
            if record.status == 0:
                await refusal(503, _STOPS)(scope, receive, reply.send)
            elif reply.is_open_stream:
                await reply.end_stream()
        except Exception as error:
            note_error(error)
            raise
        finally:
            self.log.end(record)
            if self._observe is not None:
                handler = getattr(scope.get("route"), "path", "none")
                self._observe(handler, scope["method"], record.status, record.seconds or 0.0)

    async def _enter(self, scope: Message, receive: Receive, send: Send) -> None:
        refused = self._refuse(scope)
        if refused is not None:
            if not _expects_continue(scope):
                await _discard(receive)
            await refused(scope, receive, send)
            return
        is_post = scope["method"] == "POST"
        self._num_posts += is_post
        try:
            await self.app(scope, _bounded(receive), send)
        finally:
            self._num_posts -= is_post

    def _refuse(self, scope: Message) -> Response | None:
        headers = dict(scope["headers"])
        if self._hosts is not None and _host_name(headers.get(b"host", b"")) not in self._hosts:
            return refusal(
                403, "this server is not known under that name: serve(allowed_hosts=[...])"
            )
        if self._path(scope) not in OPEN_PATHS and not self._has_key(headers):
            return refusal(401, "wrong or missing API key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                return refusal(415, "the Content-Type must be application/json")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length[:20]) > MAX_BODY_BYTES:
                return refusal(413, _TOO_LARGE)
            if self._num_posts >= self._max_posts:
                return refusal(429, "too many requests at a time: try again")
        return None

    def _path(self, scope: Message) -> str:
        path: str = scope["path"]
        root = self._root_path
        return path[len(root) :] if root and path.startswith(root + "/") else path

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if not self._digests:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        # Behind a Jupyter proxy, Authorization is Jupyter's: both are looked at.
        given = [_digest(headers.get(b"x-api-key", b""))]
        if scheme.lower() == b"bearer":
            given.append(_digest(token.strip()))
        matches = [hmac.compare_digest(g, d) for g in given for d in self._digests]
        return any(matches)


_HOST = re.compile(r"([^\[\]:@/\s]+|\[[0-9a-f:.]+\])(?::[0-9]*)?")
_STOPS = "the server stops"
_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes"


def _digest(key: bytes) -> bytes:
    """All of one length, so that a comparison does not tell that of the key."""
    return hashlib.sha256(key).digest()


def _host_name(host: bytes) -> str:
    """The name in a Host header, without the port; IPv6 addresses keep their brackets.

    What is no name and port is left as it is, which no server is known under.
    """
    text = host.decode("latin-1").strip().lower()
    match = _HOST.fullmatch(text)
    return text if match is None else match[1]


def _expects_continue(scope: Message) -> bool:
    """Whether the client waits for a word before it sends its body."""
    return dict(scope["headers"]).get(b"expect", b"").lower() == b"100-continue"


def _for_browsers(app: Any, origins: Collection[str]) -> CORSMiddleware:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),  # clients have some of their own; the key is in a header, no cookie
        expose_headers=("Retry-After",),
    )


class _Reply:
    """What has been sent of the reply to a request."""

    def __init__(self, record: RequestRecord, send: Send) -> None:
        self.is_open_stream = False
        self._record = record
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self.is_open_stream = kind.startswith(b"text/event-stream")
        elif not message.get("more_body", False):
            self.is_open_stream = False
        await self._send(message)

    async def end_stream(self) -> None:
        """Tell the client why no more comes, in the way of errors inside a stream."""
        event = to_json(error_body(_STOPS, 503))
        body = b"data: " + event + b"\n\ndata: [DONE]\n\n"
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _bounded(receive: Receive) -> Receive:
    """`receive`, with bounds on the body's size and on how long it takes."""
    received = 0
    is_complete = False
    deadline = time.monotonic() + BODY_TIMEOUT_S

    async def bounded() -> Message:
        nonlocal received, is_complete
        if is_complete:  # what is left to come is the client's leave
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise BodyTooSlowError(f"the body took more than {BODY_TIMEOUT_S:g} s") from None
        received += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if received > MAX_BODY_BYTES:
            if not is_complete:
                await _discard(receive)
            raise BodyTooLargeError(_TOO_LARGE)
        return message

    return bounded


async def _discard(receive: Receive) -> None:
    """Read what a client still sends, and forget it."""

    async def read() -> None:
        discarded = 0
        while discarded <= MAX_DISCARDED_BYTES:
            message = await receive()
            discarded += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        pass
