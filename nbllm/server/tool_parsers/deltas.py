"""What parsers say about a model's text, piece by piece, and how the pieces are put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CallPiece:
    """A piece of a tool call.

    Attributes:
        index: which call of the text; a number is never used for a second call.
        id: of the call, in its first piece.
        name: of the function, in the call's first piece.
        arguments: text to append to the call's arguments.
        withdrawn: what was taken for a call is none: it was cut off, or is malformed. All of its
            text follows as content.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    withdrawn: bool = False


@dataclass(frozen=True)
class Delta:
    """One of three: content, reasoning, or a piece of a call."""

    content: str = ""
    reasoning: str = ""
    call: CallPiece | None = None


@dataclass(frozen=True)
class ToolCall:
    """A finished call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedText:
    """A whole text; what does not occur is None, or empty."""

    content: str | None
    reasoning: str | None
    calls: list[ToolCall]


@dataclass
class _GrowingCall:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


def gather(deltas: Iterable[Delta]) -> ParsedText:
    """Put the deltas of a text together, in their order; withdrawn calls are left out."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, _GrowingCall] = {}
    for delta in deltas:
        content.append(delta.content)
        reasoning.append(delta.reasoning)
        piece = delta.call
        if piece is None:
            continue
        if piece.withdrawn:
            del calls[piece.index]
            continue
        if piece.id is not None and piece.name is not None:
            calls[piece.index] = _GrowingCall(piece.id, piece.name)
        calls[piece.index].arguments.append(piece.arguments)
    return ParsedText(
        content="".join(content) or None,
        reasoning="".join(reasoning) or None,
        calls=[ToolCall(c.id, c.name, "".join(c.arguments)) for c in calls.values()],
    )
