"""Reasoning is set apart from the answer, whole and streamed."""

from __future__ import annotations

import itertools
import sys
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbllm.errors import InvalidRequestError
from nbllm.server.reasoning_parsers import (
    REASONING_PARSERS,
    make_reasoning_parser,
    parse_reasoning,
)
from nbllm.server.tool_parsers import ParsedText, gather, make_tool_parser

NAMES = sorted(REASONING_PARSERS)
texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é"]),
        max_size=9,
    ).map("".join),
)


def split(name: str, text: str) -> tuple[str | None, str | None]:
    parsed = parse_reasoning(name, text)
    return parsed.reasoning, parsed.content


@pytest.mark.parametrize("name", NAMES)
def test_what_is_between_the_tags_is_reasoning(name: str) -> None:
    text = "<think>\nA greeting.\n</think>\n\nHello!"
    assert split(name, text) == ("\nA greeting.\n", "\n\nHello!")
    assert split(name, "\n" + text) == ("\nA greeting.\n", "\n\nHello!")
    assert split(name, "<think>\n\n</think>\n\nHello!") == ("\n\n", "\n\nHello!")
    assert split(name, "<think></think>Hello!") == (None, "Hello!")


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_that_is_cut_off_is_reasoning(name: str) -> None:
    assert split(name, "<think>Let me") == ("Let me", None)
    assert split(name, "<think>Let me</thi") == ("Let me</thi", None)


@pytest.mark.parametrize("name", NAMES)
def test_tags_in_the_answer_are_the_answer(name: str) -> None:
    text = "<think>a</think>The tags <think> and </think>."
    assert split(name, text) == ("a", "The tags <think> and </think>.")


def test_deepseek_may_begin_without_a_tag() -> None:
    assert split("deepseek_r1", " A greeting.</think>Hello!") == (" A greeting.", "Hello!")
    assert split("deepseek_r1", "</think>Hello!") == (None, "Hello!")
    assert split("deepseek_r1", " <</think>Hello!") == (" <", "Hello!")
    assert split("deepseek_r1", "A greeting <think>") == ("A greeting <think>", None)
    assert split("deepseek_r1", "<thin") == ("<thin", None)


def test_qwen_reasons_only_if_it_begins_with_the_tag() -> None:
    for text in ("Hello! <think>a</think>", "a</think>b", "</think>", " \n", "<thin", " <thinx"):
        assert split("qwen3", text) == (None, text)


def test_an_unknown_name_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InvalidRequestError, match="deepseek_r1, qwen3") as caught:
        make_reasoning_parser("no such parser")
    assert caught.value.parameter == "reasoning_parser"


@pytest.mark.parametrize("name", NAMES)
def test_text_is_streamed_as_it_arrives(name: str) -> None:
    parser = make_reasoning_parser(name)
    seen = [gather(parser.feed(piece)) for piece in ("<think>a", "b <", "/think", ">c", "d")]
    assert [(part.reasoning, part.content) for part in seen] == [
        *(("a", None), ("b ", None), (None, None), (None, "c"), (None, "d"))
    ]
    assert parser.finish() == []


def test_the_answer_can_be_searched_for_calls_as_it_arrives() -> None:
    text = '<think>a</think>\n\n<tool_call>{"name": "f", "arguments": {"b": 1}}</tool_call>'
    reasoning, tools = make_reasoning_parser("qwen3"), make_tool_parser("hermes", lambda: "id")
    deltas = []
    for delta in itertools.chain.from_iterable(map(reasoning.feed, text)):
        deltas += [delta] if delta.reasoning else tools.feed(delta.content)
    parsed = gather(deltas + reasoning.finish() + tools.finish())
    assert (parsed.reasoning, parsed.content) == ("a", None)
    assert [(call.name, call.arguments) for call in parsed.calls] == [("f", '{"b": 1}')]


@settings(deadline=None)  # the machine is shared
@given(st.sampled_from(NAMES), texts, st.lists(st.integers(0, 1000), max_size=8))
def test_any_division_into_pieces_gives_the_same(name: str, text: str, places: list[int]) -> None:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    for pieces in ([text[a:b] for a, b in itertools.pairwise(borders)], list(text)):
        parser = make_reasoning_parser(name)
        deltas = [delta for piece in pieces for delta in parser.feed(piece)]
        assert gather(deltas + parser.finish()) == parse_reasoning(name, text)


@settings(deadline=None)  # the machine is shared
@given(st.sampled_from(NAMES), texts)
def test_nothing_is_lost_but_the_tags(name: str, text: str) -> None:
    reasoning, content = (part or "" for part in split(name, text))
    begins = text.lstrip().startswith("<think>")
    if name == "qwen3" and not begins:
        assert (reasoning, content) == ("", text)
        return
    thought, _, answer = (text.lstrip().removeprefix("<think>") if begins else text).partition(
        "</think>"
    )
    assert (reasoning, content) == (thought, answer)


def count_calls(name: str, text: str) -> int:
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    parser = make_reasoning_parser(name)
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
@pytest.mark.parametrize("unit", ["<think>abcdef", "      ", "a</thin", "<<<<<<"])
def test_a_text_of_twice_the_length_takes_twice_the_work(name: str, unit: str) -> None:
    assert count_calls(name, unit * 800) < 2.1 * count_calls(name, unit * 400)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_in_single_characters_is_handed_out_once(name: str) -> None:
    text = "<think>" + "a" * 50_000 + "</think>" + "b" * 50_000
    parser = make_reasoning_parser(name)
    deltas = [delta for char in text for delta in parser.feed(char)] + parser.finish()
    assert len(deltas) == 100_000
    assert gather(deltas) == ParsedText("b" * 50_000, "a" * 50_000, [])
