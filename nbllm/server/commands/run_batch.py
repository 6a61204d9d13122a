"""`nbllm run-batch`: a file of requests in, a file of replies out, as in OpenAI's batch API.

Each line of the input names a route and holds a body; it is answered by the server's own
application, without a socket, many at a time. Source: OpenAI's batch input and output format.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nbllm.errors import InvalidRequestError
from nbllm.progress import progress_bar
from nbllm.server.commands.engine_options import add_engine_arguments, llm_options, read_config

_MAX_IN_FLIGHT = 1024
_HOST = "localhost"
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm run-batch`."""
    parser.add_argument("-i", "--input-file", type=Path, required=True, help="requests, JSON lines")
    parser.add_argument("-o", "--output-file", type=Path, required=True, help="replies, JSON lines")
    parser.add_argument("--served-model-name", help="what requests may call the model")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer the file; returns 0, or 1 if some line had an error."""
    from nbllm.llm import LLM

    read_config(arguments)
    if not arguments.input_file.is_file():
        raise InvalidRequestError(
            f"there is no file {arguments.input_file}", parameter="input_file"
        )
    with LLM(**llm_options(arguments)) as llm:
        return asyncio.run(_answer_file(llm, arguments))


async def _answer_file(llm: Any, arguments: argparse.Namespace) -> int:
    from nbllm.server.app import make_app

    name = arguments.served_model_name or llm.model_name
    app = make_app(llm, api_key=None, hosts=frozenset({_HOST}), model_name=name)
    with (
        arguments.input_file.open(encoding="utf-8", errors="replace") as requests,
        arguments.output_file.open("w", encoding="utf-8") as replies,
    ):
        num_lines = sum(1 for line in requests if line.strip())
        requests.seek(0)
        num_failed = 0
        with closing(progress_bar(num_lines, "Answering", unit="request")) as bar:
            async for reply in _answers(app, (line for line in requests if line.strip())):
                num_failed += _write(replies, reply)
                bar.update(1)
    return int(num_failed > 0)


async def _answers(app: Any, lines: Iterator[str]) -> AsyncIterator[dict[str, Any]]:
    """Replies as they come, to lines that are read as they are needed."""
    pending = {asyncio.ensure_future(_answer_line(app, x)) for x in islice(lines, _MAX_IN_FLIGHT)}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            yield task.result()
        for line in islice(lines, len(done)):
            pending.add(asyncio.ensure_future(_answer_line(app, line)))


def _write(file: IO[str], reply: dict[str, Any]) -> bool:
    """Write a line at once: what is answered is not lost. True if it tells of an error."""
    file.write(json.dumps(reply, ensure_ascii=False) + "\n")
    file.flush()
    return reply["error"] is not None


async def _answer_line(app: Any, line: str) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": None,
        "response": None,
        "error": None,
    }
    try:
        request = json.loads(line)
        reply["custom_id"] = request["custom_id"]
        route, body, method = request["url"], request["body"], request.get("method", "POST")
    except (ValueError, KeyError, TypeError, AttributeError):
        reply["error"] = _error("a line must be JSON with custom_id, method, url and body")
        return reply
    if route not in ROUTES or method != "POST":
        reply["error"] = _error(f"url must be one of {', '.join(ROUTES)}, and method POST")
        return reply
    if isinstance(body, dict) and body.get("stream"):
        reply["error"] = _error("stream must be false: the replies go to a file")
        return reply
    status, text = await _call(app, route, json.dumps(body).encode())
    answer = json.loads(text)
    reply["response"] = {
        "status_code": status,
        "request_id": f"req_{uuid.uuid4().hex}",
        "body": answer,
    }
    if status != 200:
        reply["error"] = answer.get("error")
    return reply


def _error(message: str) -> dict[str, str]:
    return {"message": message, "type": "invalid_request_error"}


async def _call(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """One POST to an ASGI application."""
    headers = {"host": _HOST, "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        "client": ("127.0.0.1", 0),
        "server": (_HOST, 80),
    }
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, pieces = 500, bytearray()

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.Event().wait()  # the client never leaves
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, bytes(pieces)
