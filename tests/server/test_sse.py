"""Server-sent events of completions and chats, byte by byte: what a strict client may rely on."""

from __future__ import annotations

import http.client
import json
import re
from typing import Any

import pytest

from nbllm.server.serve import Server

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: list[Any] = [
    pytest.param(CHAT, {}, 1, id="chat"),
    pytest.param(CHAT, {"max_tokens": 1}, 1, id="one token"),
    pytest.param(CHAT, {"n": 3, "temperature": 1, "seed": 2}, 3, id="choices"),
    pytest.param(CHAT, {"logprobs": True, "top_logprobs": 2}, 1, id="logprobs"),
    pytest.param(CHAT, {"stop": ["a"]}, 1, id="stop"),
    pytest.param(CHAT, {"tools": [WEATHER], "tool_choice": NAMED}, 1, id="call"),
    pytest.param(CHAT, {"response_format": PERSON}, 1, id="schema"),
    pytest.param(COMPLETION, {"prompt": "Once upon a time"}, 1, id="completion"),
    pytest.param(COMPLETION, {"prompt": ["Once", "What is 3 + 4?"], "n": 2}, 4, id="prompts"),
    pytest.param(COMPLETION, {"prompt": "Once", "echo": True, "logprobs": 1}, 1, id="echo"),
    pytest.param(
        COMPLETION, {"prompt": "Grüße, 東京 👩‍👩‍👧! ", "n": 2, "seed": 1}, 2, id="unicode"
    ),
]


def raw_stream(server: Server, path: str, body: dict[str, Any]) -> tuple[str | None, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        assert reply.status == 200
        return reply.getheader("Content-Type"), reply.read()
    finally:
        connection.close()


def chunks_of(raw: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that has nothing but them, each in an event of one line."""
    assert re.fullmatch(rb"(data: \{[^\r\n]*\}\n\n)+data: \[DONE\]\n\n", raw), raw[-300:]
    assert raw.isascii()  # no reader can cut a character in two
    return [json.loads(event.removeprefix(b"data: ")) for event in raw.split(b"\n\n")[:-2]]


@pytest.mark.parametrize("usage", ["none", "last", "each"])
@pytest.mark.parametrize(("path", "body", "num_choices"), BODIES)
def test_a_stream_has_a_role_and_a_reason_for_each_choice_and_then_the_usage(
    server: Server, path: str, body: dict[str, Any], num_choices: int, usage: str
) -> None:
    sent = {"max_tokens": 12, "temperature": 0, "stream": True} | body
    if path == CHAT:
        sent["messages"] = QUESTION
    if usage != "none":
        sent["stream_options"] = {
            "include_usage": True,
            "continuous_usage_stats": usage == "each",
        }
    if sent.get("n", 1) > 1:
        sent["temperature"] = 1
    kind, raw = raw_stream(server, path, sent)
    assert kind is not None and kind.split(";")[0] == "text/event-stream"
    chunks = chunks_of(raw)

    heads = {(c["id"], c["created"], c["model"], c["object"]) for c in chunks}
    expected = "chat.completion.chunk" if path == CHAT else "text_completion"
    assert [(model, name) for _, _, model, name in heads] == [("nbllm-demo", expected)]
    if usage == "none":
        assert not any("usage" in chunk for chunk in chunks)
    else:
        last = chunks.pop()
        assert last["choices"] == []
        total = last["usage"]
        assert total["total_tokens"] == total["prompt_tokens"] + total["completion_tokens"]
        counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
        if usage == "last":
            assert not any(counts)
        else:
            assert counts == sorted(counts)
            assert counts[-1] == total["completion_tokens"] > 0

    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    for index in range(num_choices):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        reasons = [choice["finish_reason"] for choice in own]
        assert reasons[-1] in ("stop", "length", "tool_calls")
        assert reasons[:-1] == [None] * (len(own) - 1)
        if path == CHAT:
            roles = [choice["delta"].get("role") for choice in own]
            assert roles == ["assistant"] + [None] * (len(own) - 1)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == set(range(num_choices))


@pytest.mark.parametrize(("path", "body", "num_choices"), BODIES)
def test_a_stream_adds_up_to_the_whole_reply(
    server: Server, path: str, body: dict[str, Any], num_choices: int
) -> None:
    sent = {"max_tokens": 12, "temperature": 0, "seed": 4} | body
    if path == CHAT:
        sent["messages"] = QUESTION
    if sent.get("n", 1) > 1:
        sent["temperature"] = 1
    _, raw = raw_stream(server, path, sent)
    whole = json.loads(raw)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(raw_stream(server, path, sent | options)[1])
    assert chunks[-1]["usage"] == whole["usage"]
    texts, arguments, reasons = [""] * num_choices, [""] * num_choices, [""] * num_choices
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice.get("delta", {})
        texts[index] += choice.get("text") or delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            arguments[index] += call["function"].get("arguments") or ""
        reasons[index] += choice["finish_reason"] or ""
    for choice in whole["choices"]:
        message = choice.get("message", {})
        assert texts[choice["index"]] == (choice.get("text") or message.get("content") or "")
        calls = message.get("tool_calls") or ()
        assert arguments[choice["index"]] == "".join(c["function"]["arguments"] for c in calls)
        assert reasons[choice["index"]] == choice["finish_reason"]
