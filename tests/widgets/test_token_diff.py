"""Where two texts part."""

from __future__ import annotations

import pytest

from nbllm.widgets.branch_tree import Alternative, Token
from nbllm.widgets.token_diff import first_difference, first_different_token, logprob_gap


@pytest.mark.parametrize(
    ("a", "b", "index"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1], [2], 0),
        ([1, 2], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
        ([], [1], None),
    ],
)
def test_the_first_id_that_differs(a: list[int], b: list[int], index: int | None) -> None:
    assert first_difference(a, b) == first_difference(b, a) == index


@pytest.mark.parametrize(
    ("a", "b", "index"),
    [
        (["the c", "at"], ["the", " ", "cat"], None),
        (["the c", "at"], ["the", " ", "cow"], 2),
        (["the c", "at"], ["The"], 0),
        (["the"], ["the", " cat"], None),
        (["the"], ["th", "ere"], None),
        (["the"], ["th", "is"], 1),
        ([], ["a"], None),
    ],
)
def test_the_first_token_whose_text_differs(a: list[str], b: list[str], index: int | None) -> None:
    ours, theirs = ([Token(0, text) for text in texts] for texts in (a, b))
    assert first_different_token(ours, theirs) == index


def test_special_tokens_are_not_compared_as_text() -> None:
    end = Token(9, "<end>", is_special=True)
    assert first_different_token([Token(1, "a"), end], [Token(2, "a"), Token(3, "b")]) is None
    assert first_different_token([Token(1, "a")], [end, Token(3, "b")]) == 1


def test_the_gap_is_known_for_alternatives_only() -> None:
    token = Token(1, "a", -0.5, (Alternative(1, "a", -0.5), Alternative(2, "b", -2.0)))
    assert logprob_gap(token, 2) == 1.5
    assert logprob_gap(token, 3) is None
    assert logprob_gap(Token(1, "a"), 2) is None
