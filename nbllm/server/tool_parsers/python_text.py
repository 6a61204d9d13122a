"""Reading of Python's literals as they arrive; nothing is evaluated but single strings and numbers.

A call's text is never given to Python's own parser: what a model writes could nest so deep, or be
so long a chain of operators, that it takes the process down.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Generator
from typing import Any

from nbllm.server.tool_parsers.json_text import MAX_DEPTH, expect, skip_space
from nbllm.server.tool_parsers.text_parser import Cursor, MalformedError, Reading

_NUMBER_CHARS = frozenset("+-._0123456789abcdefABCDEFxXoO")
_NUMBER = re.compile(
    r"[-+]?(0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+"
    r"|([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?)"
)
_MAX_NUMBER = 400  # characters; Python refuses to write integers of many more digits
# Models that have seen much JSON write its words, too.
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_WORD_BEGINNINGS = frozenset("TFNtfn")
_ESCAPED = frozenset("\n\\'\"abfnrtvxuUN0123")
_LARGE_OCTAL = frozenset("4567")  # three digits of them are more than a byte: deprecated

Literal = Generator[None, None, Any]


def read_items(
    cursor: Cursor, closing: str, read_item: Callable[[], Reading]
) -> Generator[None, None, bool]:
    """Read items between commas up to `closing`; returns whether there is a comma.

    Raises:
        MalformedError: something else than a comma is between two items.
    """
    has_comma = False
    while True:
        yield from skip_space(cursor)
        if cursor.char == closing:
            yield
            return has_comma
        yield from read_item()
        yield from skip_space(cursor)
        if cursor.char != closing:
            yield from expect(cursor, ",")
            has_comma = True


def read_literal(cursor: Cursor, depth: int) -> Literal:
    """Read a literal that JSON has a form for; returns its value.

    Args:
        depth: number of lists, tuples and dicts around it.

    Raises:
        MalformedError: it is none, or is nested too deep.
    """
    char = cursor.char
    if depth > MAX_DEPTH:
        raise MalformedError
    if char in ("'", '"'):
        return (yield from _read_string(cursor))
    if char in ("[", "("):
        return (yield from _read_sequence(cursor, depth))
    if char == "{":
        return (yield from _read_dict(cursor, depth))
    if char in _WORD_BEGINNINGS:
        return (yield from _read_word(cursor))
    return (yield from _read_number(cursor))


def _read_string(cursor: Cursor) -> Literal:
    quote = cursor.char
    written = [quote]
    yield
    while cursor.char != quote:
        if cursor.char in ("", "\n", "\r"):
            raise MalformedError
        if cursor.char == "\\":
            yield
            if not cursor.char or cursor.char in _LARGE_OCTAL:
                raise MalformedError
            # Python keeps the backslash of an escape it does not know, and warns about it.
            written.append("\\" if cursor.char in _ESCAPED else "\\\\")
        written.append(cursor.char)
        yield
    yield
    written.append(quote)
    return _evaluate("".join(written))


def _read_sequence(cursor: Cursor, depth: int) -> Literal:
    closing = "]" if cursor.char == "[" else ")"
    items: list[Any] = []

    def read_item() -> Reading:
        items.append((yield from read_literal(cursor, depth + 1)))

    yield
    has_comma = yield from read_items(cursor, closing, read_item)
    if closing == ")" and len(items) == 1 and not has_comma:
        return items[0]  # no tuple, but a value in parentheses
    return items


def _read_dict(cursor: Cursor, depth: int) -> Literal:
    items: dict[str, Any] = {}

    def read_item() -> Reading:
        if cursor.char not in ("'", '"'):
            raise MalformedError  # JSON's keys are strings
        key = yield from _read_string(cursor)
        yield from skip_space(cursor)
        yield from expect(cursor, ":")
        yield from skip_space(cursor)
        items[key] = yield from read_literal(cursor, depth + 1)

    yield
    yield from read_items(cursor, "}", read_item)
    return items


def _read_word(cursor: Cursor) -> Literal:
    start = cursor.position
    while cursor.char.isalnum() or cursor.char == "_":
        yield
    word = cursor.text_from(start)
    if word not in _WORDS:
        raise MalformedError
    return _WORDS[word]


def _read_number(cursor: Cursor) -> Literal:
    start = cursor.position
    while cursor.char in _NUMBER_CHARS:
        yield
    written = cursor.text_from(start)
    if len(written) > _MAX_NUMBER or not _NUMBER.fullmatch(written):
        raise MalformedError
    value = _evaluate(written)
    if not math.isfinite(value):
        raise MalformedError
    return value


def _evaluate(written: str) -> Any:
    try:
        return ast.literal_eval(written)
    except (SyntaxError, ValueError) as error:
        raise MalformedError from error
