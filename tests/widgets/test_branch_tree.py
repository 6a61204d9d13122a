"""BranchTree: what was tried, and what it shares."""

from __future__ import annotations

import pandas as pd

from nbllm.widgets.branch_tree import ROOT, BranchTree, Token


def tokens(text: str) -> list[Token]:
    return [Token(ord(char), char, -1.0) for char in text]


def texts(tree: BranchTree) -> list[tuple[int, str]]:
    return [(branch.depth, branch.text) for branch in tree.branches()]


def test_what_begins_alike_is_kept_once() -> None:
    tree = BranchTree("prompt")
    first = tree.extend(ROOT, tokens("abcd"))
    second = tree.extend(ROOT, tokens("abxy"))
    assert len(tree) == 6
    assert "".join(token.text for token in tree.tokens(first)) == "abcd"
    assert "".join(token.text for token in tree.tokens(second)) == "abxy"
    assert tree.path(first)[:2] == tree.path(second)[:2]
    assert tree.extend(ROOT, tokens("abcd")) == first and len(tree) == 6
    assert tree.path(ROOT) == [] and tree.extend(first, []) == first


def test_a_branch_comes_after_the_one_that_it_leaves_in_the_order_of_place() -> None:
    tree = BranchTree()
    for text in ("abcd", "abcx", "apq", "aprs", "z"):
        last = tree.extend(ROOT, tokens(text))
    assert texts(tree) == [(0, "abcd"), (1, "z"), (1, "pq"), (2, "rs"), (1, "x")]
    end = tree.branches()[1]
    assert end.node == end.start == last
    assert tree.branches()[0].start == tree.path(tree.branches()[0].node)[0]


def test_special_tokens_are_no_text_of_a_branch() -> None:
    tree = BranchTree()
    tree.extend(ROOT, [Token(1, "hi"), Token(2, "<end>", is_special=True)])
    assert texts(tree) == [(0, "hi")]
    assert BranchTree().branches() == []


def test_forgetting_a_branch_leaves_what_others_share_and_where_they_ended() -> None:
    tree = BranchTree()
    tree.end(tree.extend(ROOT, tokens("ab")))
    long = tree.extend(ROOT, tokens("abcd"))
    other = tree.extend(ROOT, tokens("axy"))
    tree.discard(other)
    assert texts(tree) == [(0, "abcd")] and other not in tree
    tree.discard(long)
    assert texts(tree) == [(0, "ab")]
    tree.discard(ROOT)
    assert len(tree) == 2


def test_rows_make_a_table_from_which_the_texts_can_be_read() -> None:
    tree = BranchTree("Once")
    tip = tree.extend(ROOT, [*tokens("ab"), Token(7, "!")])
    tree.extend(ROOT, tokens("ac"))
    frame = pd.DataFrame(tree.rows()).set_index("node")
    assert list(frame.columns) == ["parent", "token_id", "logprob", "text"]
    assert frame.loc[ROOT, "text"] == "Once" and frame["parent"].isna().sum() == 1
    assert frame.loc[tip, "token_id"] == 7 and pd.isna(frame.loc[tip, "logprob"])
    text, node = "", tip
    while node != ROOT:
        text, node = str(frame.loc[node, "text"]) + text, int(frame.loc[node, "parent"])
    assert text == "ab!"
