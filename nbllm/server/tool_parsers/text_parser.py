"""TextParser: reads a model's text character by character, however it is cut into pieces.

A parser is a generator that looks at the current character and yields to be given the next one.
So a format is written down as if the whole text were there, no character is read twice, and the
pieces' borders can't matter.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator
from typing import Literal

from nbllm.server.tool_parsers.deltas import Delta

Reading = Generator[None, None, None]
Kind = Literal["content", "reasoning"]


class MalformedError(Exception):
    """What was read is not of the format; never leaves a parser."""


class Cursor:
    """The current character of a text, and a record of those before it.

    Attributes:
        char: not read yet; empty at the end of the text.
    """

    def __init__(self) -> None:
        self.char = ""
        self._record = io.StringIO()
        self._is_recording = False

    @property
    def position(self) -> int:
        """Of `char` in the record."""
        return self._record.tell()

    def start_record(self, text: str = "") -> None:
        """Forget the record and begin another one with `text`."""
        self._record = io.StringIO()
        self._record.write(text)
        self._is_recording = True

    def stop_record(self) -> str:
        """The whole record, which ends."""
        text = self._record.getvalue()
        self._record = io.StringIO()
        self._is_recording = False
        return text

    def text_from(self, position: int) -> str:
        """What was read from `position` of the record up to `char`."""
        self._record.seek(position)
        return self._record.read()

    def was_read(self) -> None:
        """`char` is dealt with."""
        if self._is_recording:
            self._record.write(self.char)


class TextParser(ABC):
    """Divides the text of one choice of one request into deltas.

    The result does not depend on how the text is divided among calls of `feed`, and time grows
    with the text's length only. No text makes a parser raise.
    """

    def __init__(self) -> None:
        self._cursor = Cursor()
        self._deltas: list[Delta] = []
        self._buffer: list[str] = []  # text that goes into one delta
        self._buffer_kind: Kind = "content"
        self._reading = self._read()
        self._is_finished = False

    def feed(self, text: str) -> list[Delta]:
        """Go on with `text`; returns what is certain now.

        Raises:
            ValueError: after `finish`.
        """
        if self._is_finished:
            raise ValueError("the text is finished")
        cursor = self._cursor
        for char in text:
            cursor.char = char
            next(self._reading)
            cursor.was_read()
        return self._take()

    def finish(self) -> list[Delta]:
        """The text ends here: returns what was held back; nothing the second time."""
        if not self._is_finished:
            self._is_finished = True
            self._cursor.char = ""
            next(self._reading, None)
        return self._take()

    @abstractmethod
    def _read(self) -> Reading:
        """Reads the text; ends when it does."""

    def _read_until(
        self, markers: Collection[str], kind: Kind = "content", held: str = ""
    ) -> Generator[None, None, str]:
        """Emits everything before the first marker, which is returned; "" if there is none.

        What may be the beginning of a marker is held back. No marker begins with another one.

        Args:
            held: what was just read, is not emitted yet and may be the beginning of a marker.
        """
        beginnings = {marker[0] for marker in markers}
        while char := self._cursor.char:
            if not held and char not in beginnings:
                self._emit(char, kind)
                yield
                continue
            held += char
            while held and not any(marker.startswith(held) for marker in markers):
                self._emit(held[0], kind)
                held = held[1:]
            yield
            if held in markers:
                return held
        for char in held:
            self._emit(char, kind)
        return ""

    def _emit(self, text: str, kind: Kind = "content") -> None:
        if kind != self._buffer_kind:
            self._flush()
            self._buffer_kind = kind
        self._buffer.append(text)

    def _flush(self) -> None:
        text = "".join(self._buffer)
        self._buffer.clear()
        if text and self._buffer_kind == "content":
            self._deltas.append(Delta(content=text))
        elif text:
            self._deltas.append(Delta(reasoning=text))

    def _take(self) -> list[Delta]:
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas
