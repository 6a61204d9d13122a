"""LabelTrie: the token sequences of labels as a tree, so that what they share is computed once.

    "net", "new", "news"       t ── leaf
                          ne <
                               w ── end-of-text | s ── leaf

The probability of a label is the product over its path. A label that others go on from ends with
the end-of-text token: without it, it would have the probability of all that begins like it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbllm.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class TrieNode:
    """A place where labels go apart, or go on.

    Attributes:
        path: token ids that lead there from the prompt.
        children: token ids that may follow, ascending.
    """

    path: tuple[int, ...]
    children: tuple[int, ...]


class LabelTrie:
    """The trie of some labels.

    Args:
        labels: token ids of each.
        end_id: the end-of-text token; None if the model has none.

    Attributes:
        sequences: the token ids that are scored for each label.
        nodes: inner nodes, each after those that lead to it; the first is the root.

    Raises:
        InvalidRequestError: a label is empty or holds the end of text, two are the same, or one
            begins another and there is no end-of-text token; `.parameter` is "labels".
    """

    def __init__(self, labels: Sequence[Sequence[int]], end_id: int | None) -> None:
        self.sequences = _ended([tuple(ids) for ids in labels], end_id)
        children: dict[tuple[int, ...], set[int]] = {}
        for ids in self.sequences:
            for depth, token_id in enumerate(ids):
                children.setdefault(ids[:depth], set()).add(token_id)
        paths = sorted(children, key=lambda path: (len(path), path))
        self.nodes = [TrieNode(path, tuple(sorted(children[path]))) for path in paths]
        number = {path: place for place, path in enumerate(paths)}
        self._steps = [
            [(number[ids[:depth]], token_id) for depth, token_id in enumerate(ids)]
            for ids in self.sequences
        ]

    def sum(self, logprobs: Sequence[Mapping[int, float]]) -> list[float]:
        """log p of each label.

        Args:
            logprobs: for each node, log-probabilities of its children.
        """
        return [sum(logprobs[node][token_id] for node, token_id in steps) for steps in self._steps]


def _ended(labels: list[tuple[int, ...]], end_id: int | None) -> list[tuple[int, ...]]:
    """The labels, those with the end of text that are the beginning of another."""
    if not all(labels):
        raise _error("a label has no tokens")
    if len(set(labels)) < len(labels):
        raise _error("two labels are the same tokens")
    if any(end_id in ids for ids in labels):
        raise _error("a label holds the end-of-text token")
    beginnings = {ids[:depth] for ids in labels for depth in range(1, len(ids))}
    if end_id is None and not beginnings.isdisjoint(labels):
        raise _error("a label is the beginning of another, and this model has no end-of-text token")
    return [(*ids, end_id) if ids in beginnings and end_id is not None else ids for ids in labels]


def _error(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"labels: {message}", parameter="labels")
