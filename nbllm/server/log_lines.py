"""What a server has to say about itself: its last lines, in memory only."""

from __future__ import annotations

import time
from collections import deque

from nbllm.errors import InvalidRequestError

MAX_LINES = 5000


class LogLines:
    """Keeps the last lines. The server's thread writes, any thread may read.

    Args:
        max_lines: how many are kept.
    """

    def __init__(self, max_lines: int = MAX_LINES) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)

    def add(self, text: str) -> None:
        """Append a line, with the time before it; what a client sent can't begin another."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lines.append(f"{now} {''.join(map(_shown, text))}")

    def tail(self, n: int) -> list[str]:
        """The last `n` lines, the oldest first.

        Raises:
            InvalidRequestError: `n` is negative.
        """
        if n < 0:
            raise InvalidRequestError("must not be negative", parameter="n")
        return list(self._lines)[-n:] if n else []


def describe(error: BaseException) -> str:
    """An error and its causes, without a traceback."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 5:
        parts.append(f"{type(cause).__name__}: {cause}"[:500])
        cause = cause.__cause__
    return ", because of ".join(parts)


def _shown(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
