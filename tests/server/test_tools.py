"""Tools in a chat request: how the text is constrained, and read."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nbllm.errors import InvalidRequestError
from nbllm.server.tool_parsers import gather
from nbllm.server.tools import MAX_TOOLS, Parsers, ToolChoice


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = tool(
    "weather",
    type="object",
    properties={"city": {"$ref": "#/$defs/city"}},
    required=["city"],
    **{"$defs": {"city": {"enum": ["Oslo", "Rome"]}}},
)
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def choose(tools: Any, choice: Any = None, **options: Any) -> ToolChoice:
    return ToolChoice.of(tools, choice, **{"parallel": True} | options)


def read(choice: ToolChoice, text: str, parsers: Parsers | None = None, size: int = 3) -> Any:
    parser = choice.parser(parsers or Parsers())
    assert parser is not None
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return gather(deltas + parser.finish())


def test_without_tools_all_is_content() -> None:
    choice = choose(None)
    assert (choice.mode, choice.constraint(), choice.parser(Parsers())) == ("none", None, None)


def test_tools_are_chosen_by_the_model_if_nothing_is_said() -> None:
    assert choose([CITY]).mode == "auto"
    assert choose([CITY], "none").mode == "none"


@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_one_of_the_tools_with_right_arguments(parallel: bool) -> None:
    structured = choose([CITY, CLOCK], "required", parallel=parallel).constraint()
    assert structured is not None
    right = [{"name": "weather", "arguments": {"city": "Oslo"}}]
    jsonschema.validate(right, structured.json)
    jsonschema.validate([{"name": "clock", "arguments": {}}], structured.json)
    for wrong in (
        [],
        [{"name": "other", "arguments": {}}],
        [{"name": "weather", "arguments": {"city": "Bonn"}}],
        [{"name": "weather", "arguments": {"city": "Oslo"}, "more": 1}],
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, structured.json)
    two = [*right, *right]
    assert jsonschema.Draft202012Validator(structured.json).is_valid(two) == parallel


def test_required_calls_are_read_whatever_the_pieces() -> None:
    calls = [{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"city": "Rome"}}]
    for size in (1, 4, 1000):
        parsed = read(choose([CITY, CLOCK], "required"), json.dumps(calls), size=size)
        assert parsed.content is None
        assert [(c.name, json.loads(c.arguments)) for c in parsed.calls] == [
            ("clock", {}),
            ("weather", {"city": "Rome"}),
        ]
        assert all(call.id.startswith("call_") for call in parsed.calls)


def test_required_calls_that_are_cut_off_are_not_lost() -> None:
    choice = choose([CITY], "required")
    parsed = read(choice, '[{"name": "weather", "arg')
    assert (parsed.content, parsed.calls) == ('[{"name": "weather", "arg', [])
    parsed = read(choice, '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "w')
    assert [call.name for call in parsed.calls] == ["weather"]


def test_the_text_of_a_named_function_is_its_arguments() -> None:
    choice = choose([CITY, CLOCK], NAMED)
    structured = choice.constraint()
    assert structured is not None
    jsonschema.validate({"city": "Oslo"}, structured.json)
    parsed = read(choice, '{"city": "Oslo"}')
    (call,) = parsed.calls
    assert (call.name, call.arguments, parsed.content) == ("weather", '{"city": "Oslo"}', None)
    assert choose([CLOCK], {"type": "function", "name": "clock"}).mode == "named"


def test_the_models_own_calls_are_read_in_its_format() -> None:
    text = 'Yes.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    parsed = read(choose([CITY]), text, Parsers("hermes"))
    assert parsed.content == "Yes."
    assert [call.name for call in parsed.calls] == ["weather"]


def test_calls_follow_reasoning() -> None:
    text = '<think>Hm <tool_call></think><tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    parsed = read(choose([CLOCK]), text, Parsers("hermes", "qwen3"))
    assert parsed.reasoning == "Hm <tool_call>"
    assert [call.name for call in parsed.calls] == ["clock"]
    parsed = read(choose(None), "<think>a</think>b", Parsers("hermes", "qwen3"))
    assert (parsed.reasoning, parsed.content) == ("a", "b")


@pytest.mark.parametrize(
    ("template", "name"),
    [("..<tool_call>..", "hermes"), ("[TOOL_CALLS]", "mistral"), ("plain", None), (None, None)],
)
def test_a_format_is_known_by_its_marks_in_the_template(
    template: str | None, name: str | None
) -> None:
    assert Parsers.choose("auto", None, template).tool_call == name


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="hermes"):
        Parsers.choose("nobody's", None, None)
    with pytest.raises(InvalidRequestError, match="qwen3"):
        Parsers.choose(None, "nobody's", None)


def test_auto_without_a_known_format_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match="tool_call_parser") as caught:
        choose([CITY]).parser(Parsers())
    assert caught.value.parameter == "tool_choice"


@pytest.mark.parametrize(
    ("tools", "choice", "parameter"),
    [
        ([], None, "tools"),
        ([CLOCK] * 2, None, "tools"),
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], None, "tools"),
        ([{"type": "function"}], None, "tools"),
        ([{"type": "other", "function": {"name": "f"}}], None, "tools"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": [1]}}], None, "tools"),
        (None, "required", "tool_choice"),
        ([CITY], "always", "tool_choice"),
        ([CITY], {"type": "function", "function": {"name": "g"}}, "tool_choice"),
        ([CITY], {"type": "function", "function": 5}, "tool_choice"),
        ([CITY], {"type": "function", "function": {"name": [{}]}}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(tools: Any, choice: Any, parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        choose(tools, choice)
    assert caught.value.parameter == parameter


def test_definitions_of_one_name_must_be_the_same() -> None:
    other = tool("other", type="object", **{"$defs": {"city": {"type": "string"}}})
    with pytest.raises(InvalidRequestError, match="city"):
        choose([CITY, other], "required").constraint()
