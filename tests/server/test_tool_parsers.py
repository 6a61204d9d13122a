"""Tool calls in a model's text: what holds for every format, and for any text at all."""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
import sys
import time
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


anything = settings(deadline=None, max_examples=50)  # the machine is shared


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


# Goal: a thousand truths, each cut up in five ways, are read exactly.

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        12_345_678_901,
        1.5,
        -2e-7,
        "",
        "Köln",
        "a\nb\t",
        'say "hi"',
        "it's",
    ),
    *(
        "</tool_call>",
        "<tool_call>",
        "[TOOL_CALLS]",
        "<|call|>",
        "; {",
        "]",
        ")",
        "\\",
        "{}",
        "日本 👩‍👧",
    ),
    *([], {}, [1, [2, {"a": "b"}]], {"a": {"b": [None, "c"]}}, ["x"] * 5),
]


def truth(rng: random.Random) -> tuple[str, list[tuple[str, dict[str, Any]]], str]:
    """What comes before the calls, the calls, what comes after them."""
    calls = [
        (
            rng.choice(["f", "get_weather", "tools.say", "x1"]),
            {f"k{i}": rng.choice(VALUES) for i in range(rng.randint(0, 4))},
        )
        for _ in range(rng.randint(1, 3))
    ]
    return rng.choice(["", "Let me look.", "Größe: 2 < 3"]), calls, rng.choice(["", "Done."])


@pytest.mark.parametrize("num_truths", [50, pytest.param(1_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_read_however_it_is_cut(name: str, num_truths: int) -> None:
    rng = random.Random(name)
    for _ in range(num_truths):
        before, calls, after = truth(rng)
        written = [WRITE[name](f, json.dumps(arguments)) for f, arguments in calls]
        if name == "pythonic":
            written = ["[" + ", ".join(call[1:-1] for call in written) + "]"]
        if name in ("llama3_json", "pythonic"):
            before = ""  # calls come first
        text = before + {"llama3_json": ";"}.get(name, "\n").join(written) + after
        for _ in range(5):
            pieces = cut(text, [rng.randrange(10_000) for _ in range(rng.randint(0, 20))])
            parsed = gather(stream(name, pieces))
            assert calls_of(parsed) == calls, pieces
            assert without_space(parsed.content or "") == without_space(before + after), pieces


# Cost


def long_texts(name: str, size: int) -> list[str]:
    """Texts of about `size` characters: a long argument, content, an unfinished call, marks."""
    long = "x" * size
    marks = ("<[{ \n" * size)[:size]
    call = WRITE[name]("f", json.dumps({"a": long}))
    return [call, long, call[: len(call) // 2], marks, " " * size]


def hostile_texts(name: str, size: int) -> list[str]:
    """Texts on which parsers that look back, or ahead, or nest take the square of the time."""
    call = WRITE[name]("f", '{"a": [1]}')
    begin = call[: call.index("f")]
    repeated = [call, begin, call[:-1], "<tool_call>", "[TOOL_CALLS]", "<|channel|>", '{"a":', "["]
    repeated += [
        '"\\\\',
        "\\u0041",
        "<",
        "[f(a=",
        "-",
        "<|message|>",
        '{"name": "f", "name": ',
        " \n",
    ]
    return [(text * size)[:size] for text in repeated] + [begin + "[" * size, begin + '"' * size]


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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_kilobytes_of_anything_take_less_than_a_second(name: str) -> None:
    """Whole and in pieces of a token's length."""
    for text in [*long_texts(name, 100_000), *hostile_texts(name, 100_000)]:
        for pieces in ([text], [text[i : i + 4] for i in range(0, len(text), 4)]):
            start = time.thread_time()
            stream(name, pieces)
            assert time.thread_time() - start < 1.0, (text[:80], len(pieces))


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_in_single_characters_is_handed_out_once(name: str) -> None:
    arguments = json.dumps({"a": "x" * 100_000})
    parser = make_tool_parser(name, numbered())
    deltas = [delta for char in WRITE[name]("f", arguments) for delta in parser.feed(char)]
    pieces = [delta.call for delta in deltas + parser.finish()]
    assert len(pieces) <= len(arguments) + 1
    assert sum(len(piece.arguments) for piece in pieces if piece is not None) == len(arguments)
    assert None not in pieces  # no content
