"""Tool calls in a model's text: examples of each format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from nbllm.server.tool_parsers import ParsedText, parse

HARMONY_CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"


def numbered() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"id{next(numbers)}"


def calls_of(parsed: ParsedText) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in parsed.calls]


def test_hermes_calls_are_in_tags() -> None:
    text = (
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '</tool_call>\n<tool_call>\n{"arguments": {}, "name": "get_time"}\n</tool_call>'
    )
    parsed = parse("hermes", text)
    assert parsed.content == "Let me look.\n"
    assert calls_of(parsed) == [("get_weather", {"city": "Paris"}), ("get_time", {})]


def test_a_hermes_call_needs_no_closing_tag_and_may_be_followed_by_text() -> None:
    opened = '<tool_call>{"name": "f", "arguments": {}}'
    assert calls_of(parse("hermes", opened)) == [("f", {})]
    assert len(parse("hermes", opened + opened + "</tool_call>").calls) == 2
    assert parse("hermes", opened + "\n</tool_call>\n\nDone.").content == "\n\nDone."


def test_tags_in_a_string_of_the_arguments_are_arguments() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>'
    parsed = parse("hermes", text)
    assert parsed.content is None
    assert calls_of(parsed) == [("f", {"a": "</tool_call><tool_call>"})]


def test_llama_calls_are_json_between_semicolons() -> None:
    text = (
        '{"name": "f", "parameters": {"a": 1}}; {"type": "function", "name": "g", "parameters": {}}'
    )
    for written in (text, "<|python_tag|>" + text, "\n" + text + " ; \n"):
        parsed = parse("llama3_json", written)
        assert parsed.content is None
        assert calls_of(parsed) == [("f", {"a": 1}), ("g", {})]


def test_llamas_other_json_and_builtin_tools_stay_content() -> None:
    for text in (
        '{"name": "Ann", "age": 3}',
        '{"a": 1}',
        "{",
        '<|python_tag|>brave_search.call(query="x")',
        'See {"name": "f", "parameters": {}}',
    ):
        assert parse("llama3_json", text) == ParsedText(text, None, [])


def test_mistral_calls_are_in_a_list() -> None:
    text = 'Ok.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
    parsed = parse("mistral", text)
    assert parsed.content == "Ok."
    assert calls_of(parsed) == [("f", {"a": 1}), ("g", {})]


def test_mistral_calls_are_names_with_arguments() -> None:
    text = '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}[TOOL_CALLS]h[CALL_ID]abcDEF123[ARGS]{"b": 2}'
    parsed = parse("mistral", text, numbered())
    assert parsed.content is None
    assert calls_of(parsed) == [("f", {"a": 1}), ("g", {}), ("h", {"b": 2})]
    assert [call.id for call in parsed.calls] == ["id0", "id1", "abcDEF123"]


def test_pythonic_calls_are_a_list_of_python_calls() -> None:
    text = (
        "[get_weather(city='Paris', days=-3, at=(48.8, 2.3), opts={\"a\": [True, None, false]},),"
        ' get_time(), tools.say(text="it\\\'s \\d\\u00e9\\n", n=(0x10))]'
    )
    parsed = parse("pythonic", text)
    assert parsed.content is None
    assert calls_of(parsed) == [
        (
            "get_weather",
            {"city": "Paris", "days": -3, "at": [48.8, 2.3], "opts": {"a": [True, None, False]}},
        ),
        ("get_time", {}),
        ("tools.say", {"text": "it's \\dé\n", "n": 16}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[]",
            "[1] as they say",
            "[link](https://example.com)",
            "f(a=1)",
            "[f(1)]",
            "[f(a=1, a=2)]",
        ),
        *("[f(a=b)]", "[f(a=g())]", "[f(a=1+2)]", "[f(a={1: 2})]", "[f(a={1})]", "[f(**{})]"),
        *(
            "[f(a=1e999)]",
            "[f(a=1j)]",
            "[f(a=b'x')]",
            "[f(a='x' 'y')]",
            "[f(a='x\ny')]",
            "[f(a=01)]",
        ),
        *("[1f()]", "[f (a=1)]", "[f(a='\\N{no such}')]", "[f(a='\\777')]", "[f(a='\x00')]"),
        *("[f(a=" + "[" * 5000, "[f(a=" + "-" * 5000 + "1)]", "[f(a=0x" + "f" * 9000 + ")]"),
    ],
)
def test_what_is_no_literal_call_stays_content(text: str) -> None:
    assert parse("pythonic", text) == ParsedText(text, None, [])


def test_a_lone_surrogate_in_a_python_string_stays_an_escape() -> None:
    (call,) = parse("pythonic", r'[f(a="\ud800é")]').calls
    assert call.arguments == r'{"a": "\ud800\u00e9"}'


def test_harmony_has_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>"
        "commentary<|message|>I'll look.<|end|><|start|>assistant"
        + HARMONY_CALL.format("get_weather", '{"city": "Paris"}')
        + "<|start|>assistant to=functions.g<|channel|>commentary json<|message|> {}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done: a <| b.<|return|>"
    )
    parsed = parse("openai", text)
    assert parsed.reasoning == "Need the weather."
    assert parsed.content == "I'll look.Done: a <| b."
    assert calls_of(parsed) == [("get_weather", {"city": "Paris"}), ("g", {})]


def test_a_harmony_text_may_begin_with_its_recipient() -> None:
    text = ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}'
    assert calls_of(parse("openai", text)) == [("f", {"a": 1})]
    assert parse("openai", " to be or not").content == " to be or not"


def test_calls_of_harmonys_builtin_tools_stay_content() -> None:
    text = "<|channel|>analysis to=python code<|message|>1+1<|call|>"
    assert parse("openai", text) == ParsedText(text, None, [])
