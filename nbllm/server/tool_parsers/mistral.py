"""Tool calls of Mistral's models.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": ...}]
    [TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]...
    [TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}[TOOL_CALLS]...

Source: the instruct tokenizers of mistral-common. The list is the older form; the third one is of
version 11, and later versions write no [CALL_ID].
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

from nbllm.server.tool_parsers.json_text import expect, skip_space
from nbllm.server.tool_parsers.text_parser import MalformedError, Reading
from nbllm.server.tool_parsers.tool_parser import ToolParser, is_name_char

_MARKER = "[TOOL_CALLS]"
_CALL_ID = "CALL_ID]"
_ARGUMENTS = "ARGS]"
_ALPHANUMERIC = string.ascii_letters + string.digits
_ID_LENGTH = 9  # mistral-common refuses others in the next request


def new_mistral_id() -> str:
    """An id in Mistral's form."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_ID_LENGTH))


class MistralParser(ToolParser):
    """Streams arguments that follow a name; calls in a list are sent when they are complete."""

    def __init__(self, new_id: Callable[[], str] = new_mistral_id) -> None:
        super().__init__(new_id)

    def _read(self) -> Reading:
        while marker := (yield from self._read_until((_MARKER,))):
            yield from self._attempt(marker, self._read_calls())

    def _read_calls(self) -> Reading:
        yield from skip_space(self._cursor)
        if self._cursor.char == "[":
            yield from self._read_list()
        else:
            yield from self._read_named_call()

    def _read_list(self) -> Reading:
        cursor = self._cursor
        yield
        while True:
            yield from skip_space(cursor)
            yield from self._read_call_object(streamed=False)
            yield from skip_space(cursor)
            if cursor.char == "]":
                yield
                return
            yield from expect(cursor, ",")

    def _read_named_call(self) -> Reading:
        cursor = self._cursor
        start = cursor.position
        while is_name_char(cursor.char):
            yield
        name = cursor.text_from(start)
        call_id = None
        yield from skip_space(cursor)
        if cursor.char == "[":
            yield
            if cursor.char == "C":
                yield from expect(cursor, _CALL_ID)
                start = cursor.position
                for _ in range(_ID_LENGTH):
                    if not cursor.char or cursor.char not in _ALPHANUMERIC:
                        raise MalformedError
                    yield
                call_id = cursor.text_from(start)
                yield from expect(cursor, "[")
            yield from expect(cursor, _ARGUMENTS)
            yield from skip_space(cursor)
        if cursor.char != "{":
            raise MalformedError
        self._begin_call(name, call_id=call_id)
        yield from self._read_arguments()
        self._end_call()
