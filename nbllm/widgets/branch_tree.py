"""BranchTree: all continuations of one prompt that were tried, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROOT = 0
"""The node of the prompt."""


class Alternative(NamedTuple):
    """What the model could have said in a place, and its log-probability (natural logarithm)."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a continuation.

    Attributes:
        token_id: its id.
        text: what it adds to the text; nothing if it is but a part of a character.
        logprob: natural logarithm, from the model's raw distribution; None if a person wrote it.
        alternatives: the most likely tokens of its place, the best first.
        is_special: it belongs to the protocol, not to the text.
    """

    token_id: int
    text: str
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    is_special: bool = False


@dataclass(slots=True)
class _Node:
    parent: int | None
    token: Token | None
    children: list[int] = field(default_factory=list)
    is_end: bool = False


class Branch(NamedTuple):
    """A continuation from where it left another one.

    Attributes:
        node: its last token.
        start: its first token that no earlier branch has.
        depth: 0 for the first continuation, 1 for one that leaves it, ...
        text: from `start` on.
    """

    node: int
    start: int
    depth: int
    text: str


class BranchTree:
    """Continuations that begin alike share their nodes, as they share pages in the engine.

    Args:
        prompt: text of the root, for `rows`.
    """

    def __init__(self, prompt: str = "") -> None:
        self.prompt = prompt
        self._nodes: dict[int, _Node] = {ROOT: _Node(None, None)}
        self._next = ROOT + 1

    def __len__(self) -> int:
        """Number of tokens, shared ones once."""
        return len(self._nodes) - 1

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def add(self, parent: int, token: Token) -> int:
        """The child of `parent` with this token, which is made if there is none."""
        for child in self._nodes[parent].children:
            known = self._nodes[child].token
            if known is not None and known.token_id == token.token_id:
                return child
        node = self._next
        self._next += 1
        self._nodes[node] = _Node(parent, token)
        self._nodes[parent].children.append(node)
        return node

    def extend(self, parent: int, tokens: Iterable[Token]) -> int:
        """`add` one after the other; the node of the last, or `parent` if there are none."""
        for token in tokens:
            parent = self.add(parent, token)
        return parent

    def end(self, node: int) -> None:
        """Say that a continuation ended here: `discard` of a longer one leaves it."""
        self._nodes[node].is_end = True

    def discard(self, node: int) -> None:
        """Forget a continuation, as far as no other one shares it."""
        while node != ROOT and not self._nodes[node].children and not self._nodes[node].is_end:
            parent = self._nodes[node].parent
            assert parent is not None
            self._nodes[parent].children.remove(node)
            del self._nodes[node]
            node = parent

    def path(self, node: int) -> list[int]:
        """The nodes from the first token of a continuation to `node`; none for the root."""
        nodes: list[int] = []
        while node != ROOT:
            nodes.append(node)
            parent = self._nodes[node].parent
            assert parent is not None
            node = parent
        return nodes[::-1]

    def tokens(self, node: int) -> list[Token]:
        """The tokens of `path`."""
        return [self._token(number) for number in self.path(node)]

    def branches(self) -> list[Branch]:
        """All continuations, each one before those that leave it, those in the order of place."""
        found: list[Branch] = []
        todo = [(ROOT, 0)]
        while todo:
            start, depth = todo.pop()
            node, texts, forks = start, [], []
            while True:
                if node != ROOT and not self._token(node).is_special:
                    texts.append(self._token(node).text)
                children = self._nodes[node].children
                if not children:
                    break
                forks += children[1:]
                node = children[0]
            if node != ROOT:
                found.append(Branch(node, start or self.path(node)[0], depth, "".join(texts)))
            todo += [(fork, depth + 1) for fork in reversed(forks)]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each node, parents first: what `pandas.DataFrame` makes a table of.

        Keys: node, parent, token_id, logprob, text. The root, node 0, has the prompt's text and
        None for what it lacks.
        """
        rows: list[dict[str, Any]] = [
            {"node": ROOT, "parent": None, "token_id": None, "logprob": None, "text": self.prompt}
        ]
        for number, node in list(self._nodes.items()):  # it may grow meanwhile
            token = node.token
            if token is not None:
                rows.append(
                    {
                        "node": number,
                        "parent": node.parent,
                        "token_id": token.token_id,
                        "logprob": token.logprob,
                        "text": token.text,
                    }
                )
        return rows

    def _token(self, node: int) -> Token:
        token = self._nodes[node].token
        assert token is not None
        return token
