"""Tool calls of Hermes 2 Pro and 3, and of Qwen 2.5 and 3.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Source: the function calling format of NousResearch/Hermes-Function-Calling.
"""

from __future__ import annotations

from nbllm.server.tool_parsers.json_text import skip_space
from nbllm.server.tool_parsers.text_parser import Reading
from nbllm.server.tool_parsers.tool_parser import ToolParser

_OPENING = "<tool_call>"
_CLOSING = "</tool_call>"


class HermesParser(ToolParser):
    """Streams arguments; a closing tag that is missing after a complete object does no harm."""

    def _read(self) -> Reading:
        while marker := (yield from self._read_until((_OPENING, _CLOSING))):
            if marker == _OPENING:
                yield from self._attempt(marker, self._read_call())
            elif not self._closes_call():
                self._emit(marker)

    def _read_call(self) -> Reading:
        yield from skip_space(self._cursor)
        yield from self._read_call_object(streamed=True)
