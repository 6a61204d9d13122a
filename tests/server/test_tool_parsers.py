"""Tool calls in a model's text: each format's examples, and what holds for any text at all."""

from __future__ import annotations

import ast
import itertools
import json
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbllm.errors import InvalidRequestError
from nbllm.server.tool_parsers import (
    MAX_CALLS,
    TOOL_PARSERS,
    Delta,
    ParsedText,
    gather,
    make_tool_parser,
    parse,
)

HARMONY_CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
WRITE: dict[str, Callable[[str, str], str]] = {  # one call, as the models write it
    "hermes": lambda name, arguments: (
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    ),
    "llama3_json": lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}',
    "mistral": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}",
    "openai": lambda name, arguments: HARMONY_CALL.format(name, arguments),
    "pythonic": lambda name, arguments: (
        "[" + f"{name}({', '.join(f'{k}={v!r}' for k, v in json.loads(arguments).items())})" + "]"
    ),
}
NAMES = sorted(TOOL_PARSERS)

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<|start|>assistant", "<|channel|>", "<|message|>", "<|constrain|>json", "<|end|>"),
    *("<|call|>", "<|return|>", "analysis", "commentary", "final", " to=functions.f", " to=python"),
    *('{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {}}', "f(a=1)", "g()"),
    *('"name"', '"arguments"', '"f"', '{"a": "\\u00e9\\n"}', "-1.5e3", "true", "None", "é"),
    *"{}[]():,;=<'\"\\ \n",
]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.builds(
        lambda name, before, after, end: (before + WRITE[name]("f", '{"a": [1]}') + after)[:end],
        st.sampled_from(NAMES),
        st.sampled_from(["", " ", "Hi", "\n<"]),
        st.sampled_from(["", "\n", "Bye", "<tool_call>", "; {", ", "]),
        st.integers(0, 120),
    ),
)
scalars = st.one_of(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(FRAGMENTS),
)
argument_objects = st.dictionaries(
    st.from_regex(r"[a-z]_[a-z]{0,3}", fullmatch=True),
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    ),
    max_size=4,
)


def numbered() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"id{next(numbers)}"


def calls_of(parsed: ParsedText) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in parsed.calls]


def stream(name: str, pieces: list[str]) -> list[Delta]:
    parser = make_tool_parser(name, numbered())
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return deltas + parser.finish()


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def without_space(text: str) -> str:
    return "".join(text.split())


# Each format's examples


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


# What holds for all formats


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_name_is_refused_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        make_tool_parser("no such parser")
    assert caught.value.parameter == "tool_call_parser"


@pytest.mark.parametrize("name", NAMES)
def test_ids_have_the_form_that_clients_expect(name: str) -> None:
    ids = {parse(name, WRITE[name]("f", "{}")).calls[0].id for _ in range(20)}
    form = r"[A-Za-z0-9]{9}" if name == "mistral" else r"call_[0-9a-f]{24}"
    assert len(ids) == 20
    assert all(re.fullmatch(form, call_id) for call_id in ids)


@pytest.mark.parametrize("name", ["hermes", "mistral", "openai"])
def test_arguments_are_streamed_as_they_arrive(name: str) -> None:
    arguments = '{"city": "Paris", "days": [1, 2]}'
    parser = make_tool_parser(name, numbered())
    sent = ""
    for char in WRITE[name]("f", arguments):
        for delta in parser.feed(char):
            assert delta.call is not None
            assert (delta.call.id, delta.call.name) == (("id0", "f") if not sent else (None, None))
            sent += delta.call.arguments or "^"  # the beginning has no arguments yet
            assert len(delta.call.arguments) <= 1
    assert sent == "^" + arguments


@pytest.mark.parametrize("name", ["llama3_json", "pythonic"])
def test_other_calls_are_sent_when_they_are_complete(name: str) -> None:
    parser = make_tool_parser(name, numbered())
    text = WRITE[name]("f", '{"a": 1}').removesuffix("]") + "\n"
    assert not any(parser.feed(char) for char in text[:-1])
    (delta,) = parser.feed(text[-1])
    assert delta.call is not None and json.loads(delta.call.arguments) == {"a": 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_cut_off_anywhere_is_content_and_withdrawn(name: str) -> None:
    text = WRITE[name]("f", '{"a": "x", "b": {"c": 2}}')
    end = text.rindex(")" if name == "pythonic" else "}") + 1
    for length in range(end):
        deltas = stream(name, list(text[:length]))
        assert gather(deltas) == ParsedText(text[:length] or None, None, [])
        begun = [d for d in deltas if d.call is not None and d.call.name is not None]
        assert len(begun) == sum(d.call is not None and d.call.withdrawn for d in deltas)
    assert len(parse(name, text[:end]).calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_malformed_arguments_are_content_and_the_text_goes_on(name: str) -> None:
    for bad in ('{"a": 01}', "{'a': 1}", '{"a": }', '{"a": NaN}', '{"a": "\t"}', '{"a": 1,}', "[]"):
        if name == "pythonic":
            continue  # its own test has worse
        text = WRITE[name]("f", bad)
        assert parse(name, text + " go on") == ParsedText(text + " go on", None, []), bad


@pytest.mark.parametrize("bad", ["", " ", "a b", "a\\u0000", "\\ud800", "x" * 257])
def test_what_is_no_name_makes_no_call(bad: str) -> None:
    text = WRITE["hermes"](bad, "{}")
    assert parse("hermes", text) == ParsedText(text, None, [])


def test_keys_that_come_twice_or_not_at_all_make_no_call() -> None:
    for body in (
        '{"name": "f"}',
        '{"arguments": {}}',
        '{"name": "f", "name": "g", "arguments": {}}',
        '{"name": "f", "arguments": {}, "parameters": {}}',
        '{"name": "f", "arguments": "{}"}',
    ):
        text = f"<tool_call>{body}</tool_call>"
        assert parse("hermes", text) == ParsedText(text, None, [])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_are_nested_too_deep_are_content(name: str) -> None:
    deep, too_deep = ('{"a": ' + "[" * n + "]" * n + "}" for n in (50, 70))
    assert len(parse(name, WRITE[name]("f", deep)).calls) == 1
    assert parse(name, WRITE[name]("f", too_deep)).calls == []


@pytest.mark.parametrize("name", NAMES)
def test_calls_beyond_the_limit_are_content(name: str) -> None:
    one = WRITE[name]("f", "{}")
    many = [one] * (MAX_CALLS + 2)
    if name == "pythonic":
        text = "[" + ", ".join(call[1:-1] for call in many) + "]"
    else:
        text = {"llama3_json": "; "}.get(name, "").join(many)
    parsed = parse(name, text)
    assert len(parsed.calls) == MAX_CALLS
    assert parsed.content is not None and parsed.content.count(one.strip("[]")) == 2


@pytest.mark.parametrize("name", NAMES)
def test_space_is_kept_unless_it_is_around_calls(name: str) -> None:
    assert parse(name, " \n").content == " \n"
    assert parse(name, "\n\nHello \n").content == "\n\nHello \n"
    assert parse(name, "\n" + WRITE[name]("f", "{}") + "\n").content is None
    assert parse(name, "").content is None


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_parser_has_nothing_more_and_takes_nothing_more(name: str) -> None:
    parser = make_tool_parser(name)
    parser.feed(" ")
    assert parser.finish() == [Delta(content=" ")]
    assert parser.finish() == []
    with pytest.raises(ValueError):
        parser.feed("more")


anything = settings(deadline=None)  # the machine is shared


@anything
@given(st.sampled_from(NAMES), texts, st.lists(st.integers(0, 10_000), max_size=12))
@example("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_<tool_call>', [3, 40, 45, 50])
def test_any_division_into_pieces_gives_the_same(name: str, text: str, places: list[int]) -> None:
    whole = parse(name, text, numbered())
    assert gather(stream(name, cut(text, places))) == whole
    assert gather(stream(name, list(text))) == whole


@anything
@given(st.sampled_from(NAMES), texts)
def test_any_text_is_kept_and_calls_are_valid(name: str, text: str) -> None:
    parsed = parse(name, text)
    for call in parsed.calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.name in text
    if not parsed.calls and (name != "openai" or "<|message|>" not in text):
        assert (parsed.content or "") == text
    rest = iter(text)  # content is the text with some parts left out
    assert all(char in rest for char in parsed.content or "")


@anything
@given(
    st.sampled_from(NAMES),
    st.text(alphabet="abc .\n<[|é", max_size=10),
    st.lists(st.tuples(st.sampled_from(["f", "get_weather", "a.b"]), argument_objects), max_size=3),
    st.text(alphabet="abc .\n<|é", max_size=10),
)
def test_content_and_calls_lose_nothing(
    name: str, before: str, calls: list[tuple[str, dict[str, Any]]], after: str
) -> None:
    written = [WRITE[name](function, json.dumps(arguments)) for function, arguments in calls]
    if name in ("llama3_json", "pythonic"):
        before = ""  # calls come first
    if name == "pythonic":
        written = ["[" + ", ".join(call[1:-1] for call in written) + "]"] if written else []
    parsed = parse(name, before + {"llama3_json": ";"}.get(name, "\n").join(written) + after)
    assert calls_of(parsed) == calls
    assert without_space(parsed.content or "") == without_space(before + after)
    if name not in ("pythonic", "llama3_json"):
        texts = [json.dumps(arguments) for _, arguments in calls]
        assert [call.arguments for call in parsed.calls] == texts  # as the model wrote them


@anything
@given(argument_objects)
def test_python_values_are_read_as_python_reads_them(arguments: dict[str, Any]) -> None:
    text = WRITE["pythonic"]("f", json.dumps(arguments))
    (call,) = parse("pythonic", text).calls
    (node,) = ast.parse(text, mode="eval").body.elts  # type: ignore[attr-defined]
    assert json.loads(call.arguments) == {k.arg: ast.literal_eval(k.value) for k in node.keywords}


@anything
@given(st.text(alphabet='{}[]",:\\u0019-+.eE truefalsn\n\t', max_size=40))
def test_json_is_read_as_strictly_as_by_python(body: str) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = f'[TOOL_CALLS]f{{"a": {body}}}'
    try:
        json.loads(f'{{"a": {body}}}', parse_constant=refuse)
    except ValueError:
        assert not any(
            call.arguments.endswith(f"{body}}}") for call in parse("mistral", text).calls
        )
    else:
        assert [call.arguments for call in parse("mistral", text).calls] == [text[13:]]


# Cost


def long_texts(name: str, size: int) -> list[str]:
    """Texts of about `size` characters: a long argument, content, an unfinished call, marks."""
    long = "x" * size
    marks = ("<[{ \n" * size)[:size]
    call = WRITE[name]("f", json.dumps({"a": long}))
    return [call, long, call[: len(call) // 2], marks, " " * size]


def count_calls(text: str, name: str) -> int:
    """How many functions, of Python's and of C's, and generators are entered for a text."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    parser = make_tool_parser(name, numbered())
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for char in text:
            parser.feed(char)
        parser.finish()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_twice_the_length_takes_twice_the_work(name: str) -> None:
    for short, long in zip(long_texts(name, 2_000), long_texts(name, 4_000), strict=True):
        assert count_calls(long, name) < 2.1 * count_calls(short, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_in_single_characters_is_handed_out_once(name: str) -> None:
    arguments = json.dumps({"a": "x" * 100_000})
    parser = make_tool_parser(name, numbered())
    deltas = [delta for char in WRITE[name]("f", arguments) for delta in parser.feed(char)]
    pieces = [delta.call for delta in deltas + parser.finish()]
    assert len(pieces) <= len(arguments) + 1
    assert sum(len(piece.arguments) for piece in pieces if piece is not None) == len(arguments)
    assert None not in pieces  # no content
