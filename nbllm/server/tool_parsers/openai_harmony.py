"""Messages of gpt-oss: reasoning, content and tool calls, each in a channel.

    <|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant<|channel|>commentary
    to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

Source: OpenAI's "Harmony response format" (docs/format.md of openai/harmony).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator

from nbllm.server.tool_parsers.json_text import expect, skip_space
from nbllm.server.tool_parsers.text_parser import Kind, MalformedError, Reading
from nbllm.server.tool_parsers.tool_parser import ToolParser, new_call_id

_OPENING = ("<|start|>", "<|channel|>")
_MARKERS = (*_OPENING, "<|end|>", "<|call|>", "<|return|>")
_MESSAGE = "<|message|>"
_IN_HEADER = ("<|channel|>", "<|constrain|>", _MESSAGE)
_MAX_HEADER = 1000
_FUNCTIONS = "functions."
_RECIPIENT = " to="

# The recipient may be named after the role or after the channel.
_HEADER = re.compile(
    r"(<\|start\|>assistant)?(\s+to=(?P<after_role>[^\s<]+))?"
    r"\s*<\|channel\|>\s*(?P<channel>analysis|commentary|final)"
    r"(\s+to=(?P<after_channel>[^\s<]+))?"
    r"\s*(<\|constrain\|>)?\s*[\w.-]*\s*<\|message\|>"
)


class OpenAIParser(ToolParser):
    """Streams arguments and reasoning; commentary to nobody is content, as users may read it.

    Calls of tools that are no functions, such as gpt-oss's own browser, are given back as content.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(new_id)
        self._message_kind: Kind | None = None  # of the message that is open

    def _read(self) -> Reading:
        if self._cursor.char == _RECIPIENT[0]:  # the prompt ends with the first message's role
            yield from self._attempt("", self._read_message(""))
        while marker := (yield from self._read_until(_MARKERS, self._message_kind or "content")):
            kind, self._message_kind = self._message_kind, None
            if marker in _OPENING:
                yield from self._attempt(marker, self._read_message(marker))
            elif kind is None and not self._closes_call():
                self._emit(marker)

    def _read_message(self, beginning: str) -> Reading:
        """Read a header and, if it is one of a call, the call. Raises MalformedError."""
        header = yield from self._read_header(beginning)
        match = _HEADER.fullmatch(header)
        if match is None:
            raise MalformedError
        recipient = match["after_channel"] or match["after_role"]
        if recipient is None:
            self._message_kind = "reasoning" if match["channel"] == "analysis" else "content"
            return
        if not recipient.startswith(_FUNCTIONS):
            raise MalformedError
        yield from skip_space(self._cursor)
        if self._cursor.char != "{":
            raise MalformedError
        self._begin_call(recipient.removeprefix(_FUNCTIONS))
        yield from self._read_arguments()
        self._end_call()

    def _read_header(self, beginning: str) -> Generator[None, None, str]:
        cursor = self._cursor
        header = beginning
        if not beginning:
            yield from expect(cursor, _RECIPIENT)
            header = _RECIPIENT
        while not header.endswith(_MESSAGE):
            if not cursor.char or len(header) == _MAX_HEADER:
                raise MalformedError
            header += cursor.char
            yield
            if header.endswith("|>") and not header.endswith(_IN_HEADER):
                raise MalformedError  # the marker of something else
        return header
