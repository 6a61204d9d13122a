"""Tool calls of Llama 3.1 and 3.2 in JSON.

    {"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}

Source: Meta's documentation of Llama 3.1's prompt format, "JSON based tool calling"; the semicolon
is what its models write between several calls.
"""

from __future__ import annotations

from nbllm.server.tool_parsers.json_text import expect, skip_space
from nbllm.server.tool_parsers.text_parser import Reading
from nbllm.server.tool_parsers.tool_parser import ToolParser

_PYTHON_TAG = "<|python_tag|>"


class Llama3JsonParser(ToolParser):
    """Calls are at the beginning of the text, or after a tag; each is sent when it is complete."""

    def _read(self) -> Reading:
        while self._cursor.char.isspace():
            self._emit(self._cursor.char)
            yield
        if self._cursor.char == "{":
            yield from self._attempt("", self._read_calls())
        while marker := (yield from self._read_until((_PYTHON_TAG,))):
            yield from self._attempt(marker, self._read_calls())

    def _read_calls(self) -> Reading:
        cursor = self._cursor
        yield from skip_space(cursor)
        while True:
            yield from self._read_call_object(streamed=False)
            yield from skip_space(cursor)
            yield from expect(cursor, ";")
            yield from skip_space(cursor)
            if not cursor.char:
                return  # nothing comes after the semicolon
