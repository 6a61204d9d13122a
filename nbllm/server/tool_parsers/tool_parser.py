"""ToolParser: what the parsers of all formats of tool calls share."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Generator

from nbllm.server.tool_parsers.deltas import CallPiece, Delta
from nbllm.server.tool_parsers.json_text import read_object, read_string, read_value
from nbllm.server.tool_parsers.text_parser import Kind, MalformedError, Reading, TextParser

MAX_CALLS = 128  # of one text, as OpenAI allows so many tools
_MAX_NAME = 256
_ARGUMENT_KEYS = ("arguments", "parameters")


def new_call_id() -> str:
    """An id in OpenAI's form."""
    return "call_" + secrets.token_hex(12)


def is_name_char(char: str) -> bool:
    """Whether a function's name may contain it: wider than OpenAI, to suit other servers' tools."""
    return char.isalnum() or (char != "" and char in "_-.:/")


class ToolParser(TextParser):
    """Finds tool calls in the text of one choice of one request.

    A call that turns out to be malformed, is cut off or is one too many is given back as content,
    as the model wrote it; if pieces of it are out already, it is withdrawn first. White space is
    left out before and between calls and after the last one, where it belongs to the format.

    Args:
        new_id: makes the ids of calls.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._new_id = new_id
        self._num_calls = 0  # begun
        self._open_call: int | None = None  # pieces are out, and it may be withdrawn
        self._unsent_from: int | None = None  # position in the record of arguments
        self._gap: list[str] | None = []  # white space since the beginning or the last call
        super().__init__()

    def finish(self) -> list[Delta]:
        deltas = super().finish()
        if self._gap and self._num_calls == 0:  # nothing but white space
            deltas.append(Delta(content="".join(self._gap)))
        self._gap = None
        return deltas

    def _attempt(self, beginning: str, reading: Reading) -> Reading:
        """Read what should be calls, after `beginning`; gives back what belongs to none."""
        self._cursor.start_record(beginning)
        try:
            yield from reading
            self._cursor.stop_record()
        except MalformedError:
            self._give_back()

    def _give_back(self) -> None:
        if self._open_call is not None:
            self._add_piece(CallPiece(self._open_call, withdrawn=True))
            self._open_call = self._unsent_from = None
        self._emit(self._cursor.stop_record())

    def _closes_call(self) -> bool:
        """Whether a closing marker belongs to a call: only white space came since; it goes, too."""
        if self._gap is None or self._num_calls == 0:
            return False
        self._gap.clear()
        return True

    def _read_call_object(self, *, streamed: bool) -> Reading:
        """Read {"name": ..., "arguments": {...}} and what else it holds, in any order.

        Args:
            streamed: send arguments as they arrive, if the name comes first.

        Raises:
            MalformedError: no such object.
        """
        cursor = self._cursor
        name = arguments = ""

        def read_member(quoted_key: str) -> Reading:
            nonlocal name, arguments
            key = json.loads(quoted_key)
            if key == "name" and not name:
                quoted = yield from read_string(cursor)
                name = json.loads(quoted)
            elif key in _ARGUMENT_KEYS and not arguments:
                if streamed and name and cursor.char == "{":
                    self._begin_call(name)
                arguments = yield from self._read_arguments()
            elif key == "name" or key in _ARGUMENT_KEYS:
                raise MalformedError  # twice
            else:
                yield from read_value(cursor, 1)

        yield from read_object(cursor, 0, read_member)
        if not name or not arguments:
            raise MalformedError
        if self._open_call is None:
            self._begin_call(name, arguments=arguments)
        self._end_call()

    def _begin_call(self, name: str, *, call_id: str | None = None, arguments: str = "") -> None:
        """Send the beginning of a call. Raises MalformedError for bad names and too many calls."""
        is_name = 0 < len(name) <= _MAX_NAME and all(is_name_char(char) for char in name)
        if not is_name or self._num_calls == MAX_CALLS:
            raise MalformedError
        index = self._open_call = self._num_calls
        self._num_calls += 1
        self._add_piece(CallPiece(index, call_id or self._new_id(), name, arguments))

    def _read_arguments(self) -> Generator[None, None, str]:
        """Read an object, whose text is returned and belongs to the call that has begun, if any.

        Raises:
            MalformedError: no object.
        """
        start = self._cursor.position
        if self._open_call is not None:
            self._unsent_from = start
        yield from read_object(self._cursor, 1)
        self._send_arguments()
        self._unsent_from = None
        return self._cursor.text_from(start)

    def _send_arguments(self) -> None:
        if self._open_call is None or self._unsent_from is None:
            return
        new = self._cursor.text_from(self._unsent_from)
        if new:
            self._unsent_from = self._cursor.position
            self._add_piece(CallPiece(self._open_call, arguments=new))

    def _end_call(self) -> None:
        """A call is complete: only what follows it can still be given back."""
        self._open_call = None
        self._cursor.start_record()
        self._gap = []

    def _add_piece(self, piece: CallPiece) -> None:
        self._flush()
        self._deltas.append(Delta(call=piece))

    def _emit(self, text: str, kind: Kind = "content") -> None:
        if kind == "content" and self._gap is not None:
            self._gap.append(text)
            if not text or text.isspace():
                return
            text = "".join(self._gap)
            self._gap = None
        super()._emit(text, kind)

    def _take(self) -> list[Delta]:
        self._send_arguments()
        return super()._take()
