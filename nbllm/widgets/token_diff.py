"""Where two generated texts part."""

from __future__ import annotations

from collections.abc import Sequence

from nbllm.widgets.branch_tree import Token


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token id in which `a` and `b` differ; None if one begins the other."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None


def first_different_token(a: Sequence[Token], b: Sequence[Token]) -> int | None:
    """Index of the first token of `b` whose text is not that of `a` in this place.

    For texts of different tokenizers, whose ids mean nothing to each other. None if one text
    begins the other.
    """
    text = "".join(token.text for token in a if not token.is_special)
    position = 0
    for index, token in enumerate(b):
        if token.is_special:
            continue
        rest = text[position : position + len(token.text)]
        if not token.text.startswith(rest):
            return index
        if len(rest) < len(token.text):
            return None
        position += len(token.text)
    return None


def logprob_gap(token: Token, other_id: int) -> float | None:
    """How much more likely `token` was than the other one in its place, in nats.

    The difference of two log-probabilities is that of the logits. None if the other one is not
    among its alternatives.
    """
    if token.logprob is None:
        return None
    known = {alternative.token_id: alternative.logprob for alternative in token.alternatives}
    return token.logprob - known[other_id] if other_id in known else None
