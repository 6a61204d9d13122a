"""One demo model and one server for all files of this folder."""

from __future__ import annotations

import gc
import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pandas as pd  # noqa: F401
import pytest

from nbllm import LLM
from nbllm.server.serve import Server

gc.freeze()  # every test ends with a collection, which need not walk these packages

Send = Callable[..., tuple[int, dict[str, str], Any]]


@pytest.fixture(scope="package")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="package")
def server(llm: LLM) -> Iterator[Server]:
    with llm.serve() as server:
        yield server
    assert not server.is_running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client(max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def send() -> Send:
    """(server, method, path, body, headers) -> status, headers in lower case, body.

    The body is sent as JSON unless it is bytes. A header that is None is left out.
    """

    def send(
        server: Server,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str | None] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        named: dict[str, str | None] = {"Authorization": f"Bearer {server.api_key}"}
        if body is not None:
            named["Content-Type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        named |= headers or {}
        try:
            sent = {name: value for name, value in named.items() if value is not None}
            connection.request(method, path, body, sent)
            reply = connection.getresponse()
            got = reply.read()
        finally:
            connection.close()
        kept = {name.lower(): value for name, value in reply.getheaders()}
        is_json = kept.get("content-type", "").startswith("application/json")
        return reply.status, kept, json.loads(got) if is_json else got.decode()

    return send
