"""Bodies that no client would send: an answer below 500 to each, and a server that lives."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nbllm import LLM
from nbllm.server.serve import Server

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", TEXT),
    ("/v1/completions", TEXT | {"logprobs": 2, "echo": True, "stop": ["x"]}),
    ("/v1/completions", TEXT | {"prompt": [1, 2, 3], "n": 2, "seed": 1, "temperature": 0.5}),
    ("/v1/completions", TEXT | {"prompt": ["a", "b"], "stream": True}),
    ("/v1/completions", TEXT | {"logit_bias": {"5": 1.5}, "top_p": 0.9, "top_k": 3}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
    (
        "/v1/chat/completions",
        CHAT | {"stream": True, "stream_options": {"include_usage": True}},
    ),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}),
    (
        "/v1/chat/completions",
        CHAT
        | {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
            ],
            "tool_choice": "required",
        },
    ),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
    (
        "/v1/responses",
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "max_output_tokens": 2,
            "text": {"format": {"type": "json_object"}},
            "stream": True,
        },
    ),
    ("/tokenize", {"prompt": "Hi"}),
    ("/detokenize", {"tokens": [1, 2]}),
]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    0.5,
    "",
    "x" * 3000,
    "\x00",
    "\ud800",
    "٣",
    "🧑‍🚀",
    [],
    {},
    [None],
    [[]],
    [[1], "a"],
    {"type": "json_schema"},
    {"a": {"b": {}}},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with LLM(device="cpu", dtype="float32", max_model_len=96) as llm, llm.serve() as server:
        yield server


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(item, (*path, key))


def mutate(rng: random.Random, body: dict[str, Any]) -> bytes:
    """One value of the body made odd or dropped, or one byte of its text."""
    kind = rng.randrange(4)
    copy = json.loads(json.dumps(body))
    path = rng.choice([path for path in paths_in(copy) if path])
    place = copy
    for key in path[:-1]:
        place = place[key]
    if kind == 0:
        del place[path[-1]]
    elif kind in (1, 2):
        place[path[-1]] = rng.choice(ODD)
    text = bytearray(json.dumps(copy).encode())
    if kind == 3:
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        if rng.random() < 0.2:
            del text[rng.randrange(len(text)) :]
    return bytes(text)


def check(server: Server, num_cases: int, seed: int) -> None:
    rng = random.Random(seed)
    host = server.url.removeprefix("http://")
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(host, timeout=10)
    counts: dict[int, int] = {}
    for number in range(num_cases):
        path, body = rng.choice(VALID)
        sent = mutate(rng, body)
        connection.request("POST", path, sent, headers)
        reply = connection.getresponse()
        answer = reply.read()
        assert reply.status < 500, (number, path, sent[:500], answer[:500])
        if reply.status != 200:
            assert json.loads(answer)["error"]["message"]
            assert reply.status in (400, 404), (path, sent[:500], answer[:500])
        counts[reply.status] = counts.get(reply.status, 0) + 1
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    assert min(counts.values()) > num_cases // 50 and set(counts) >= {200, 400}


@pytest.mark.parametrize("path", sorted({path for path, _ in VALID}))
def test_the_bodies_that_are_mutated_are_right_ones(server: Server, path: str) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for route, body in VALID:
        if route == path:
            connection.request(
                "POST",
                path,
                json.dumps(body),
                {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"},
            )
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            reply.read()
    connection.close()


def test_no_body_is_answered_by_a_server_error(server: Server) -> None:
    check(server, num_cases=150, seed=0)


@pytest.mark.slow
def test_ten_thousand_bodies_are_answered_without_a_server_error(server: Server) -> None:
    check(server, num_cases=10_000, seed=1)
