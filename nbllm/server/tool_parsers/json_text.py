"""Reading of JSON as it arrives, strictly by RFC 8259, for its extent and not for its value."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator

from nbllm.server.tool_parsers.text_parser import Cursor, MalformedError, Reading

MAX_DEPTH = 64  # as of a request's JSON

# Sets, since the end of the text, an empty string, would be "in" any string.
_SPACE = frozenset(" \t\n\r")
_ESCAPED = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_NUMBER_CHARS = frozenset("+-.0123456789eE")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS = {"t": "true", "f": "false", "n": "null"}


def skip_space(cursor: Cursor) -> Reading:
    while cursor.char in _SPACE:
        yield


def expect(cursor: Cursor, text: str) -> Reading:
    """Raises MalformedError if anything but `text` comes."""
    for char in text:
        if cursor.char != char:
            raise MalformedError
        yield


def read_object(
    cursor: Cursor, depth: int = 0, read_member: Callable[[str], Reading] | None = None
) -> Reading:
    """Read an object, up to the character after it.

    Args:
        depth: number of arrays and objects around it.
        read_member: reads a value, and is given its key as it is written, in quotes.

    Raises:
        MalformedError: no object, or one that is nested too deep.
    """
    if depth >= MAX_DEPTH:
        raise MalformedError
    yield from expect(cursor, "{")
    yield from skip_space(cursor)
    if cursor.char == "}":
        yield
        return
    while True:
        key = yield from read_string(cursor)
        yield from skip_space(cursor)
        yield from expect(cursor, ":")
        yield from skip_space(cursor)
        yield from read_member(key) if read_member else read_value(cursor, depth + 1)
        yield from skip_space(cursor)
        if cursor.char == "}":
            yield
            return
        yield from expect(cursor, ",")
        yield from skip_space(cursor)


def read_value(cursor: Cursor, depth: int) -> Reading:
    """Read any value, like `read_object`."""
    char = cursor.char
    if char == "{":
        yield from read_object(cursor, depth)
    elif char == "[":
        yield from _read_array(cursor, depth)
    elif char == '"':
        yield from read_string(cursor)
    elif char in _WORDS:
        yield from expect(cursor, _WORDS[char])
    else:
        yield from _read_number(cursor)


def read_string(cursor: Cursor) -> Generator[None, None, str]:
    """Read a string; returns it as it is written, in quotes. Raises MalformedError."""
    start = cursor.position
    yield from expect(cursor, '"')
    while cursor.char != '"':
        if cursor.char < " ":  # a control character, or the end
            raise MalformedError
        is_escape = cursor.char == "\\"
        yield
        if is_escape:
            yield from _read_escape(cursor)
    yield
    return cursor.text_from(start)


def _read_escape(cursor: Cursor) -> Reading:
    if cursor.char in _ESCAPED:
        yield
        return
    yield from expect(cursor, "u")
    for _ in range(4):
        if cursor.char not in _HEX:
            raise MalformedError
        yield


def _read_array(cursor: Cursor, depth: int) -> Reading:
    if depth >= MAX_DEPTH:
        raise MalformedError
    yield from expect(cursor, "[")
    yield from skip_space(cursor)
    if cursor.char == "]":
        yield
        return
    while True:
        yield from read_value(cursor, depth + 1)
        yield from skip_space(cursor)
        if cursor.char == "]":
            yield
            return
        yield from expect(cursor, ",")
        yield from skip_space(cursor)


def _read_number(cursor: Cursor) -> Reading:
    start = cursor.position
    while cursor.char in _NUMBER_CHARS:
        yield
    if not _NUMBER.fullmatch(cursor.text_from(start)):
        raise MalformedError
