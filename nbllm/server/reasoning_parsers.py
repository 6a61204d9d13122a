"""Reasoning in a model's text, set apart from the answer, by vLLM's names of the formats.

<think>The user greets me.</think>Hello!
"""

from __future__ import annotations

from nbllm.errors import InvalidRequestError
from nbllm.server.tool_parsers.deltas import ParsedText, gather
from nbllm.server.tool_parsers.text_parser import Kind, Reading, TextParser

_OPENING = "<think>"
_CLOSING = "</think>"


class _ThinkParser(TextParser):
    """White space before the opening tag goes with it; everything else is kept as it is."""

    _without_opening: Kind  # what the text begins with if there is no opening tag

    def _read(self) -> Reading:
        cursor = self._cursor
        spaces: list[str] = []
        while cursor.char.isspace():
            spaces.append(cursor.char)
            yield
        tag = ""
        while cursor.char and tag != _OPENING and _OPENING.startswith(tag + cursor.char):
            tag += cursor.char
            yield
        kind: Kind = "reasoning"
        if tag == _OPENING:
            tag = ""
        else:
            kind = self._without_opening
            self._emit("".join(spaces), kind)
        if kind == "reasoning":  # `tag` may be the beginning of the closing one
            yield from self._read_until((_CLOSING,), "reasoning", tag)
            tag = ""
        yield from self._read_until((), "content", tag)


class DeepSeekR1Parser(_ThinkParser):
    """All is reasoning up to the closing tag; the template may have written the opening one.

    Source: the chat template and the model card of DeepSeek-R1.
    """

    _without_opening = "reasoning"


class Qwen3Parser(_ThinkParser):
    """There is reasoning only if the text begins with the opening tag.

    Source: the chat template and the model card of Qwen3.
    """

    _without_opening = "content"


REASONING_PARSERS: dict[str, type[TextParser]] = {
    "deepseek_r1": DeepSeekR1Parser,
    "qwen3": Qwen3Parser,
}


def make_reasoning_parser(name: str) -> TextParser:
    """A parser for one choice of one request.

    Raises:
        InvalidRequestError: there is no such parser.
    """
    kind = REASONING_PARSERS.get(name)
    if kind is None:
        known = ", ".join(REASONING_PARSERS)
        raise InvalidRequestError(
            f"there is no reasoning_parser {name!r}; there are {known}",
            parameter="reasoning_parser",
        )
    return kind()


def parse_reasoning(name: str, text: str) -> ParsedText:
    """What is in a whole text, the same as if it were streamed.

    Raises:
        InvalidRequestError: there is no such parser.
    """
    parser = make_reasoning_parser(name)
    return gather([*parser.feed(text), *parser.finish()])
