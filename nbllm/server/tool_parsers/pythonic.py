"""Tool calls as a list of Python calls, as Llama 3.2's and other small models write them.

    [get_weather(city="Paris", days=3), get_time()]

Source: Meta's documentation of Llama 3.2's prompt format, "zero-shot function calling".
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from nbllm.server.tool_parsers.json_text import expect, skip_space
from nbllm.server.tool_parsers.python_text import read_items, read_literal
from nbllm.server.tool_parsers.text_parser import MalformedError, Reading
from nbllm.server.tool_parsers.tool_parser import ToolParser


class PythonicParser(ToolParser):
    """The list is at the beginning of the text; each call is sent when it is complete.

    Arguments have names, and literals as values.
    """

    def _read(self) -> Reading:
        while self._cursor.char.isspace():
            self._emit(self._cursor.char)
            yield
        if self._cursor.char == "[":
            yield from self._attempt("", self._read_list())
        yield from self._read_until(())

    def _read_list(self) -> Reading:
        cursor = self._cursor
        yield
        yield from skip_space(cursor)
        while True:
            yield from self._read_call()
            yield from skip_space(cursor)
            if cursor.char == ",":
                yield
                yield from skip_space(cursor)
                if cursor.char != "]":
                    continue
            yield from expect(cursor, "]")
            return

    def _read_call(self) -> Reading:
        cursor = self._cursor
        name = yield from self._read_name(".")
        arguments: dict[str, Any] = {}

        def read_argument() -> Reading:
            key = yield from self._read_name()
            yield from skip_space(cursor)
            yield from expect(cursor, "=")
            yield from skip_space(cursor)
            if key in arguments:
                raise MalformedError
            arguments[key] = yield from read_literal(cursor, 1)

        yield from expect(cursor, "(")
        yield from read_items(cursor, ")", read_argument)
        self._begin_call(name, arguments=_to_json(arguments))
        self._end_call()

    def _read_name(self, separator: str = "") -> Generator[None, None, str]:
        """Read an identifier, or several with `separator` between them. Raises MalformedError."""
        start = self._cursor.position
        while (char := self._cursor.char).isalnum() or (char and char in "_" + separator):
            yield
        name = self._cursor.text_from(start)
        parts = name.split(separator) if separator else [name]
        if not all(part.isidentifier() for part in parts):
            raise MalformedError
        return name


def _to_json(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which an escape can make
        return json.dumps(arguments)
    return text
