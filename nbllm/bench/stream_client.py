"""A client for many streams at a time, light enough not to be what is measured.

While streams run it only notes when bytes come; they are read once all have ended.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

_STREAM_TIMEOUT_S = 600.0
_DONE = b"[DONE]"


@dataclass(slots=True)
class Stream:
    """What came of one request.

    Attributes:
        number: of its body among those that were sent.
        started: when it was sent, in seconds of `time.perf_counter()`.
        text: all of it.
        times: when each piece of the text came; one or more tokens each.
        num_tokens: of the text, as the server's usage says; None if it does not say.
        error: why it has no end, or None.
    """

    number: int
    started: float
    text: str = ""
    times: list[float] = field(default_factory=list)
    num_tokens: int | None = None
    error: str | None = None


def run_streams(
    url: str,
    bodies: Sequence[dict[str, Any]],
    *,
    concurrency: int,
    api_key: str | None = None,
) -> tuple[list[Stream], float, float]:
    """POST every body, `concurrency` at a time, each on a connection of its own.

    Args:
        url: of the route: http only.
        bodies: in OpenAI's form, with `"stream": True`.
        concurrency: the next one is sent when one of so many has ended.
        api_key: sent as `Authorization: Bearer`.

    Returns:
        the streams in the order of `bodies`, and for all of them together the seconds and the
        seconds of this process's CPU time. One that fails does not raise: see `Stream.error`.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    requests = [_request(parts.path, parts.netloc, body, api_key) for body in bodies]
    begin, cpu_begin = time.perf_counter(), time.process_time()
    recordings = asyncio.run(_run(parts.hostname, parts.port, requests, concurrency))
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    return [_read(number, recording) for number, recording in enumerate(recordings)], seconds, cpu_s


class _Recording(asyncio.Protocol):
    """Sends a request and keeps what comes back until the server closes."""

    def __init__(self, request: bytes) -> None:
        self.started = time.perf_counter()
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.error: str | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request

    def protocol(self) -> _Recording:
        """What asyncio asks for its protocol."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.pieces.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.error = repr(exc)
        if not self.ended.done():
            self.ended.set_result(None)


async def _run(
    host: str, port: int, requests: Sequence[bytes], concurrency: int
) -> list[_Recording]:
    loop = asyncio.get_running_loop()
    recordings = [_Recording(request) for request in requests]
    waiting = iter(recordings)

    async def work() -> None:
        for recording in waiting:
            recording.started = time.perf_counter()
            try:
                transport, _ = await loop.create_connection(recording.protocol, host, port)
            except OSError as error:
                recording.error = repr(error)
                continue
            try:
                await asyncio.wait_for(recording.ended, _STREAM_TIMEOUT_S)
            except asyncio.TimeoutError:
                recording.error = f"no end within {_STREAM_TIMEOUT_S:g} s"
            finally:
                transport.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return recordings


def _request(path: str, host: str, body: dict[str, Any], api_key: str | None) -> bytes:
    content = json.dumps(body).encode()
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{key}"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def _read(number: int, recording: _Recording) -> Stream:
    stream = Stream(number, recording.started, error=recording.error)
    if stream.error is not None:
        return stream
    raw = b"".join(recording.pieces)
    try:
        status, body = _parse_reply(raw)
    except (http.client.HTTPException, OSError) as error:
        stream.error = f"no whole reply: {error!r}"
        return stream
    if status != 200:
        stream.error = f"status {status}: {body[:300].decode(errors='replace')}"
        return stream
    ends = _ends_of_events(raw)
    arrived = list(accumulate(map(len, recording.pieces)))
    events = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
    texts: list[str] = []
    reason = None
    for event, end in zip(events, ends, strict=True):
        if event == _DONE:
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            stream.error = str(chunk["error"])[:300]
            return stream
        if chunk.get("usage"):
            stream.num_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            reason = choice["finish_reason"] or reason
            if text:
                texts.append(text)
                stream.times.append(recording.times[bisect_left(arrived, end)])
    stream.text = "".join(texts)
    if events[-1:] != [_DONE] or reason is None:
        stream.error = "it has no end"
    return stream


class _Received:
    """Bytes in the form of a socket, for the standard library's reader of HTTP."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parse_reply(raw: bytes) -> tuple[int, bytes]:
    """Status and body, put together from its chunks."""
    response = http.client.HTTPResponse(_Received(raw))  # type: ignore[arg-type]
    response.begin()
    return response.status, response.read()


def _ends_of_events(raw: bytes) -> list[int]:
    """Where the events of a reply end in its bytes: nothing else in HTTP has two line feeds."""
    ends: list[int] = []
    end = raw.find(b"\n\n")
    while end >= 0:
        ends.append(end + 2)
        end = raw.find(b"\n\n", end + 2)
    return ends
