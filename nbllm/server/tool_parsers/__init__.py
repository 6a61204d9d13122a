"""Tool calls in a model's text, in the formats that models are trained on, by vLLM's names."""

from __future__ import annotations

from collections.abc import Callable

from nbllm.errors import InvalidRequestError
from nbllm.server.tool_parsers.deltas import CallPiece, Delta, ParsedText, ToolCall, gather
from nbllm.server.tool_parsers.hermes import HermesParser
from nbllm.server.tool_parsers.llama3_json import Llama3JsonParser
from nbllm.server.tool_parsers.mistral import MistralParser
from nbllm.server.tool_parsers.openai_harmony import OpenAIParser
from nbllm.server.tool_parsers.pythonic import PythonicParser
from nbllm.server.tool_parsers.tool_parser import MAX_CALLS, ToolParser

__all__ = [
    "MAX_CALLS",
    "TOOL_PARSERS",
    "CallPiece",
    "Delta",
    "ParsedText",
    "ToolCall",
    "ToolParser",
    "gather",
    "make_tool_parser",
    "parse",
]

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "openai": OpenAIParser,
    "pythonic": PythonicParser,
}


def make_tool_parser(name: str, new_id: Callable[[], str] | None = None) -> ToolParser:
    """A parser for one choice of one request.

    Args:
        name: of the format.
        new_id: makes the ids of calls; random ones in the format's form by default.

    Raises:
        InvalidRequestError: there is no such parser.
    """
    kind = TOOL_PARSERS.get(name)
    if kind is None:
        known = ", ".join(TOOL_PARSERS)
        raise InvalidRequestError(
            f"there is no tool_call_parser {name!r}; there are {known}",
            parameter="tool_call_parser",
        )
    return kind() if new_id is None else kind(new_id)


def parse(name: str, text: str, new_id: Callable[[], str] | None = None) -> ParsedText:
    """What is in a whole text, the same as if it were streamed.

    Raises:
        InvalidRequestError: there is no such parser.
    """
    parser = make_tool_parser(name, new_id)
    return gather([*parser.feed(text), *parser.finish()])
