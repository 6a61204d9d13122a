"""Every bound on what a request may ask for: the last value inside is served, the next is a 400.

Where OpenAI has a bound of 4 stop strings, and vLLM has none, there may be 64 of 1,024 letters:
stops are matched on the text in one pass, so that more of them cost nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from nbllm import LLM
from nbllm.server import completions, door, messages, protocol, response_format, tokens, tools
from nbllm.server.serve import Server
from nbllm.structured import grammar, repetition

Send = Callable[..., tuple[int, dict[str, str], Any]]
Make = Callable[[int], dict[str, Any]]

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 1}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
VOCAB_SIZE, MAX_MODEL_LEN = 3072, 1024
INT32, INT64 = 2**31 - 1, 2**63 - 1


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth - 1):
        value = [value]
    return value


def nested_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth - 1):
        schema = {"properties": {"a": schema}, "required": ["a"]}
    return schema


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def structured(**form: Any) -> dict[str, Any]:
    return TEXT | {"structured_outputs": form}


def formatted(schema: Any) -> dict[str, Any]:
    return TALK | {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


# Parameter -> route, largest value that is taken, body for a value.
UPPER: dict[str, tuple[str, int, Make]] = {
    "n": (COMPLETIONS, protocol.MAX_N, lambda n: TEXT | {"n": n}),
    "stop": (COMPLETIONS, protocol.MAX_STOPS, lambda k: TEXT | {"stop": ["x"] * k}),
    "stop, its letters": (COMPLETIONS, 1024, lambda k: TEXT | {"stop": "x" * k}),
    "stop, letters in a list": (CHAT, 1024, lambda k: TALK | {"stop": ["y", "x" * k]}),
    "bad_words": (
        COMPLETIONS,
        protocol.MAX_STOPS,
        lambda k: TEXT | {"bad_words": [f"w{i}" for i in range(k)]},
    ),
    "logprobs": (COMPLETIONS, protocol.MAX_LOGPROBS, lambda k: TEXT | {"logprobs": k}),
    "top_logprobs": (
        CHAT,
        protocol.MAX_LOGPROBS,
        lambda k: TALK | {"logprobs": True, "top_logprobs": k},
    ),
    "prompt_logprobs": (
        COMPLETIONS,
        protocol.MAX_LOGPROBS,
        lambda k: TEXT | {"prompt_logprobs": k},
    ),
    "logit_bias": (
        COMPLETIONS,
        protocol.MAX_LOGIT_BIAS,
        lambda k: TEXT | {"logit_bias": {str(i): 1 for i in range(k)}},
    ),
    "logit_bias, its ids": (
        COMPLETIONS,
        VOCAB_SIZE - 1,
        lambda i: TEXT | {"logit_bias": {str(i): 1}},
    ),
    "allowed_token_ids": (
        COMPLETIONS,
        protocol.MAX_ALLOWED_IDS,
        lambda k: TEXT | {"allowed_token_ids": [5] * k},
    ),
    "allowed_token_ids, the ids": (
        COMPLETIONS,
        VOCAB_SIZE - 1,
        lambda i: TEXT | {"allowed_token_ids": [i]},
    ),
    "stop_token_ids": (
        COMPLETIONS,
        protocol.MAX_LOGIT_BIAS,
        lambda k: TEXT | {"stop_token_ids": [5] * k},
    ),
    "stop_token_ids, the ids": (
        COMPLETIONS,
        VOCAB_SIZE - 1,
        lambda i: TEXT | {"stop_token_ids": [i]},
    ),
    "prompt": (
        COMPLETIONS,
        completions.MAX_PROMPTS,
        lambda k: TEXT | {"prompt": ["a"] * k},
    ),
    "prompt, its ids": (COMPLETIONS, VOCAB_SIZE - 1, lambda i: TEXT | {"prompt": [i]}),
    "prompt, its length": (
        COMPLETIONS,
        MAX_MODEL_LEN - 1,
        lambda k: TEXT | {"prompt": [5] * k},
    ),
    "top_k": (COMPLETIONS, INT32, lambda k: TEXT | {"top_k": k, "temperature": 1}),
    "seed": (COMPLETIONS, INT64, lambda k: TEXT | {"seed": k}),
    "priority": (COMPLETIONS, INT32, lambda k: TEXT | {"priority": k}),
    "min_tokens": (COMPLETIONS, 1, lambda k: TEXT | {"min_tokens": k}),
    "request_id": (COMPLETIONS, 128, lambda k: TEXT | {"request_id": "x" * k}),
    "presence_penalty": (COMPLETIONS, 2, lambda k: TEXT | {"presence_penalty": k}),
    "frequency_penalty": (COMPLETIONS, 2, lambda k: TEXT | {"frequency_penalty": k}),
    "repetition_penalty": (COMPLETIONS, 10**6, lambda k: TEXT | {"repetition_penalty": k}),
    "temperature": (COMPLETIONS, 10**6, lambda k: TEXT | {"temperature": k}),
    "tools": (
        CHAT,
        tools.MAX_TOOLS,
        lambda k: TALK | {"tools": [tool(f"f{i}") for i in range(k)], "tool_choice": "none"},
    ),
    "tools, their names": (
        CHAT,
        64,
        lambda k: TALK | {"tools": [tool("f" * k)], "tool_choice": "none"},
    ),
    "reasoning_effort": (CHAT, 16, lambda k: TALK | {"reasoning_effort": "x" * k}),
    "body: JSON's depth": (  # an object around it
        COMPLETIONS,
        protocol.MAX_DEPTH - 1,
        lambda depth: TEXT | {"unknown": nested(depth)},
    ),
    "structured_outputs: regex": (
        COMPLETIONS,
        grammar.MAX_REGEX_BYTES,
        lambda k: structured(regex="a" * k),
    ),
    "structured_outputs: bytes of a regex": (
        COMPLETIONS,
        grammar.MAX_REGEX_BYTES // 2,
        lambda k: structured(regex="é" * k),
    ),
    "structured_outputs: repetitions of a regex": (
        COMPLETIONS,
        repetition.MAX_REPEATED,
        lambda k: structured(regex=f"(ab?c*){{{k // 3}}}" + "x" * (k % 3)),
    ),
    "structured_outputs: repetitions in a grammar": (
        COMPLETIONS,
        repetition.MAX_REPEATED // 100,
        lambda k: structured(grammar=f"start: X\nX: Y{{{k}}}\nY: /[ab]{{100}}/"),
    ),
    "structured_outputs: repetitions in a schema": (
        COMPLETIONS,
        repetition.MAX_REPEATED // 1000,
        lambda k: structured(json={"type": "string", "pattern": f"([ab]{{1000}}){{{k}}}"}),
    ),
    "structured_outputs: brackets": (
        COMPLETIONS,
        grammar.MAX_NESTED,
        lambda k: structured(regex="(" * k + "a" + ")" * k),
    ),
    "structured_outputs: grammar": (
        COMPLETIONS,
        grammar.MAX_GRAMMAR_BYTES,
        lambda k: structured(grammar='start: "a" //'.ljust(k, "x")),
    ),
    "structured_outputs: schema": (
        COMPLETIONS,
        grammar.MAX_SCHEMA_BYTES,
        lambda k: structured(json=json.dumps({"type": "null", "title": "x" * (k - 29)})),
    ),
    "structured_outputs: choice": (
        COMPLETIONS,
        response_format.MAX_CHOICES,
        lambda k: structured(choice=["yes"] * k),
    ),
    "response_format: schema": (
        CHAT,
        response_format.MAX_SCHEMA_CHARS,
        lambda k: formatted({"type": "null", "title": "x" * (k - 29)}),
    ),
    "metadata": (
        RESPONSES,
        16,
        lambda k: {
            "input": "Hi",
            "max_output_tokens": 1,
            "metadata": {str(i): "" for i in range(k)},
        },
    ),
    "metadata, a value": (
        RESPONSES,
        512,
        lambda k: {"input": "Hi", "max_output_tokens": 1, "metadata": {"a": "x" * k}},
    ),
    "prompt of /tokenize": (
        "/tokenize",
        tokens.MAX_TOKENIZED,
        lambda k: {"prompt": "word" * (k // 4) + "x" * (k % 4)},
    ),
    "tokens": ("/detokenize", tokens.MAX_TOKENIZED, lambda k: {"tokens": [70] * k}),
    "tokens, the ids": ("/detokenize", VOCAB_SIZE - 1, lambda i: {"tokens": [i]}),
}
# The same for the smallest value.
LOWER: dict[str, tuple[str, int, Make]] = {
    "n": (COMPLETIONS, 1, lambda n: TEXT | {"n": n}),
    "max_tokens": (COMPLETIONS, 1, lambda n: TEXT | {"max_tokens": n}),
    "max_tokens of a chat": (CHAT, 1, lambda n: TALK | {"max_tokens": n}),
    "max_completion_tokens": (CHAT, 1, lambda n: TALK | {"max_completion_tokens": n}),
    "max_output_tokens": (RESPONSES, 1, lambda n: {"input": "Hi", "max_output_tokens": n}),
    "logprobs": (COMPLETIONS, 0, lambda k: TEXT | {"logprobs": k}),
    "prompt_logprobs": (COMPLETIONS, 0, lambda k: TEXT | {"prompt_logprobs": k}),
    "top_k": (COMPLETIONS, -1, lambda k: TEXT | {"top_k": k, "temperature": 1}),
    "seed": (COMPLETIONS, -(2**63), lambda k: TEXT | {"seed": k}),
    "presence_penalty": (COMPLETIONS, -2, lambda k: TEXT | {"presence_penalty": k}),
    "frequency_penalty": (COMPLETIONS, -2, lambda k: TEXT | {"frequency_penalty": k}),
    "repetition_penalty": (COMPLETIONS, 1, lambda k: TEXT | {"repetition_penalty": k * 1e-6}),
    "temperature": (COMPLETIONS, 0, lambda k: TEXT | {"temperature": k}),
    "top_p": (COMPLETIONS, 1, lambda k: TEXT | {"top_p": k * 1e-3, "temperature": 1}),
    "min_p": (COMPLETIONS, 0, lambda k: TEXT | {"min_p": k * 1e-3, "temperature": 1}),
    "prompt, its ids": (COMPLETIONS, 0, lambda i: TEXT | {"prompt": [i]}),
    "prompt": (COMPLETIONS, 1, lambda k: TEXT | {"prompt": ["a"] * k}),
    "tokens, the ids": ("/detokenize", 0, lambda i: {"tokens": [i]}),
}


def check(send: Send, server: Server, name: str, route: str, body: Any, *, fits: bool) -> None:
    status, _, reply = send(server, "POST", route, body)
    assert status == (200 if fits else 400), (name, str(reply)[:500])
    if not fits:
        named = name.split(",")[0].split(":")[0].split(" of ")[0]
        assert reply["error"]["param"] == (None if named == "body" else named), reply
        assert len(json.dumps(reply)) < 700


def test_the_limits_are_those_of_the_demo_model(llm: LLM) -> None:
    assert llm.model_config.vocab_size == VOCAB_SIZE
    assert llm.config.max_model_len == MAX_MODEL_LEN


@pytest.mark.parametrize("name", UPPER)
def test_the_largest_value_is_served_and_a_larger_one_is_refused(
    send: Send, server: Server, name: str
) -> None:
    route, most, make = UPPER[name]
    for value in (most - 1, most, most + 1):
        check(send, server, name, route, make(value), fits=value <= most)


@pytest.mark.parametrize("name", LOWER)
def test_the_smallest_value_is_served_and_a_smaller_one_is_refused(
    send: Send, server: Server, name: str
) -> None:
    route, least, make = LOWER[name]
    for value in (least + 1, least, least - 1):
        check(send, server, name, route, make(value), fits=value >= least)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e400"])
def test_numbers_must_be_finite(send: Send, server: Server, name: str, value: str) -> None:
    body = f'{{"prompt": "Hi", "max_tokens": 1, "{name}": {value}}}'.encode()
    assert send(server, "POST", COMPLETIONS, body)[0] == 400


def test_the_body_may_have_so_many_bytes(send: Send, server: Server) -> None:
    for size, status in ((-1, 200), (0, 200), (1, 413)):
        body = json.dumps(TEXT).encode().ljust(door.MAX_BODY_BYTES + size)
        assert send(server, "POST", COMPLETIONS, body)[0] == status


def test_a_schema_may_be_nested_so_deep(send: Send, server: Server) -> None:
    most = 3 * grammar.MAX_SCHEMA_DEPTH // 2  # a schema is two levels: "properties", and a name
    for depth in (most - 1, most, most + 1):
        body = structured(json=json.dumps(nested_schema(depth)))
        check(send, server, "structured_outputs", COMPLETIONS, body, fits=depth <= most)


def test_there_may_be_so_many_choices_and_messages(send: Send, server: Server) -> None:
    body = TEXT | {"prompt": ["a"] * (completions.MAX_CHOICES // 128 + 1), "n": 128}
    check(send, server, "n", COMPLETIONS, body, fits=False)
    many = [{"role": "user", "content": ""}] * (messages.MAX_MESSAGES + 1)
    check(send, server, "messages", CHAT, TALK | {"messages": many}, fits=False)
    assert len(messages.template_messages(many[1:])) == messages.MAX_MESSAGES


def test_a_thousand_stop_strings_are_refused_and_the_most_that_may_be_work(
    send: Send, server: Server
) -> None:
    stops = [f"no such text {i}" for i in range(1000)]
    body = TEXT | {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    check(send, server, "stop", COMPLETIONS, body | {"stop": stops}, fits=False)
    _, _, plain = send(server, "POST", COMPLETIONS, body)
    _, _, stopped = send(server, "POST", COMPLETIONS, body | {"stop": stops[: protocol.MAX_STOPS]})
    assert stopped["choices"][0]["text"] == plain["choices"][0]["text"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (COMPLETIONS, TEXT | {"prompt": "word " * 1_400_000}),
        (CHAT, TALK | {"messages": [{"role": "user", "content": "word " * 1_400_000}]}),
        (RESPONSES, {"input": "word " * 1_400_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "word " * 1_400_000}]}),
    ],
)
def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenized(
    llm: LLM, send: Send, server: Server, monkeypatch: pytest.MonkeyPatch, route: str, body: Any
) -> None:
    def fail(*_: Any) -> list[int]:
        raise AssertionError("it takes seconds")

    monkeypatch.setattr(llm.get_tokenizer(), "encode", fail)
    status, _, reply = send(server, "POST", route, body)
    assert status == 400
    assert "max_model_len" in reply["error"]["message"]


def test_a_long_prompt_that_is_to_be_cut_is_tokenized(send: Send, server: Server) -> None:
    body = TEXT | {"prompt": "word " * 40_000, "truncate_prompt_tokens": 5}
    _, _, reply = send(server, "POST", COMPLETIONS, body)
    assert reply["usage"]["prompt_tokens"] == 5


# -- grammars that mean harm ----------------------------------------------------------------------

BLOWING_UP = "(a|b)*a(a|b){20}"
HOSTILE: dict[str, dict[str, Any]] = {
    "quantifiers in quantifiers": {"regex": "((a+)+)+b"},
    "a million letters": {"regex": "(a{1000}){1000}"},
    "a million letters after one": {"regex": "x(a{1000}){1000}"},
    "a large number": {"regex": "a{4294967295}"},
    "ranges in ranges": {"regex": "(.{0,1000}x){0,1000}"},
    "many states": {"regex": BLOWING_UP},
    "many dots": {"regex": ".*" * 2000},
    "many classes": {"regex": "(\\w\\d\\s)*" * 400},
    "letters of all scripts": {"regex": "(\\p{L}{1,500}|\\w{1,500}){1,500}"},
    "terminals that double": {
        "grammar": "start: T0\n"
        + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(30))
        + 'T30: "a"'
    },
    "a schema in a grammar": {
        "grammar": 'start: %json {"type": "string", "pattern": "(a{1000}){1000}"}'
    },
    "rules that double": {
        "grammar": "start: r0\n"
        + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(30))
        + 'r30: "x"'
    },
    "ambiguity": {"grammar": 'start: start start start | "x" | '},
    "two thousand rules": {
        "grammar": "start: r0\n"
        + "".join(f'r{i}: "{i}" r{i + 1}?\n' for i in range(2000))
        + "r2000:"
    },
    "a pattern": {"json": {"type": "string", "pattern": "((a{100}){100}){100}"}},
    "a name's pattern": {"json": {"patternProperties": {"(a{1000}){1000}": {"type": "null"}}}},
    "many patterns": {
        "json": {
            "properties": {f"k{i}": {"type": "string", "pattern": BLOWING_UP} for i in range(300)}
        }
    },
    "a multiple": {"json": {"type": "integer", "multipleOf": 999_999_937}},
    "ten million items": {"json": {"type": "array", "minItems": 10**7, "items": {"type": "null"}}},
    "a billion letters": {"json": {"type": "string", "minLength": 10**9}},
    "itself": {"json": {"$ref": "#"}},
    "no end": {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}},
    "all combinations": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(6)]}
                for i in range(8)
            ]
        }
    },
    "long texts": {"choice": ["a" * 30_000, "a" * 30_000 + "b"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_no_burden(send: Send, server: Server, name: str) -> None:
    """Neither its compilation nor the first steps; the slowest takes half a second."""
    body = TEXT | {"max_tokens": 4, "temperature": 0, "structured_outputs": HOSTILE[name]}
    start = time.monotonic()
    status, _, reply = send(server, "POST", COMPLETIONS, body)
    assert time.monotonic() - start < 5.0
    assert status in (200, 400), reply
    if status == 400:
        assert reply["error"]["param"] == "structured_outputs"


def test_a_grammar_that_grows_too_large_on_the_way_is_the_clients_fault(
    send: Send, server: Server
) -> None:
    form = {"regex": "x" + HOSTILE["many classes"]["regex"]}
    body = TEXT | {"max_tokens": 40, "ignore_eos": True, "structured_outputs": form}
    status, _, reply = send(server, "POST", COMPLETIONS, body)
    assert (status, reply["error"]["param"]) == (400, "structured_outputs"), reply
    status, _, text = send(server, "POST", COMPLETIONS, body | {"stream": True})
    error = text["error"] if status == 400 else json.loads(text.split("data: ")[-2])["error"]
    assert (error["code"], error["param"]) == (400, "structured_outputs")
