"""sim_join, topk, dedup: exactly the pairs that comparing all with all gives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbllm import LLM, InvalidRequestError
from nbllm.dataframe import nearest as blocks
from nbllm.dataframe.nearest import nearest, similar_groups

REVIEWS = ["The food was great.", "The film was awful.", "Great food!", "I hated the film."]
QUESTIONS = ["What is the capital of France?", "Was the food good?", "Was the film bad?"]


def cosine(llm: LLM, left: list[str], right: list[str]) -> np.ndarray:
    left_vectors, right_vectors = (
        np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])
        for texts in (left, right)
    )
    return left_vectors @ right_vectors.T


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_each_row_is_joined_with_the_most_similar_rows(llm: LLM) -> None:
    left = pd.DataFrame({"id": [1, 2, 3], "text": QUESTIONS}, index=[7, 7, 8])
    right = pd.DataFrame({"text": REVIEWS, "stars": [5, 1, 5, 1]})
    result = left.llm.sim_join(right, "text", k=2)
    assert list(result.columns) == ["id", "text_x", "text_y", "stars", "similarity"]
    expected = cosine(llm, QUESTIONS, REVIEWS)
    order = np.argsort(-expected, axis=1)[:, :2]
    assert result["id"].tolist() == [1, 1, 2, 2, 3, 3]
    assert result["text_y"].tolist() == [REVIEWS[column] for column in order.ravel()]
    assert result["stars"].dtype == right["stars"].dtype
    best = np.take_along_axis(expected, order, axis=1).ravel()
    np.testing.assert_allclose(result["similarity"], best, atol=1e-5)
    assert result.index.equals(pd.RangeIndex(6))


def test_pairs_below_the_least_similarity_are_left_out(llm: LLM) -> None:
    left = pd.DataFrame({"a": [REVIEWS[0], QUESTIONS[0], None]})
    right = pd.DataFrame({"b": REVIEWS, "n": [1, 2, 3, 4]})
    inner = left.llm.sim_join(right, "a", "b", min_similarity=1.0)
    assert inner[["a", "b", "n"]].to_numpy().tolist() == [[REVIEWS[0], REVIEWS[0], 1]]
    outer = left.llm.sim_join(right, "a", "b", min_similarity=1.0, how="left")
    assert outer["n"].tolist()[0] == 1
    assert outer["n"].isna().tolist() == [False, True, True]
    assert outer["similarity"].isna().tolist() == [False, True, True]
    pairs = pd.DataFrame({"a": [0], "key": [0]})
    as_pandas = pairs.merge(right.assign(key=9), on="key", how="left")
    assert outer["n"].dtype == as_pandas["n"].dtype


def test_columns_of_vectors_are_joined_without_a_model(llm: LLM) -> None:
    left = pd.DataFrame({"v": [np.array([1.0, 0.0]), np.array([0.0, 2.0])]})
    right = pd.DataFrame({"w": [[0.0, 1.0], [3.0, 0.1], [-1.0, 0.0]], "name": ["y", "x", "-x"]})
    result = left.llm.sim_join(right, "v", "w")
    assert result["name"].tolist() == ["x", "y"]
    with pytest.raises(InvalidRequestError, match="dimensions") as caught:
        left.llm.sim_join(pd.DataFrame({"w": [[1.0, 2.0, 3.0]]}), "v", "w")
    assert caught.value.parameter == "right_on"
    with pytest.raises(InvalidRequestError, match="differ") as caught:
        left.llm.sim_join(pd.DataFrame({"w": [[1.0, 2.0, 3.0], [1.0]]}), "v", "w")
    assert caught.value.parameter == "right_on"
    with pytest.raises(InvalidRequestError, match="none"):
        left.llm.sim_join(pd.DataFrame({"w": [[1.0, float("nan")]]}), "v", "w")


def test_embedded_frames_are_compared_as_texts_are(llm: LLM) -> None:
    frame = pd.DataFrame({"text": REVIEWS})
    embedded = frame.llm.embed("text")
    by_text = frame.llm.topk("text", 2, query=QUESTIONS[1])
    by_vector = embedded.llm.topk("embedding", 2, query=QUESTIONS[1])
    assert by_text["text"].tolist() == by_vector["text"].tolist()


def test_a_journal_keeps_the_vectors_of_both_sides(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = pd.DataFrame({"a": QUESTIONS}), pd.DataFrame({"b": REVIEWS})
    first = left.llm.sim_join(right, "a", "b", journal=tmp_path / "j")
    seen: list[Any] = []
    call = llm._embedding_call

    def spy(rows: Any, keep: int | None) -> Any:
        return call((seen.append(row) or row for row in rows), keep)  # type: ignore[func-returns-value]

    monkeypatch.setattr(llm, "_embedding_call", spy)
    again = left.llm.sim_join(right, "a", "b", journal=tmp_path / "j", llm=llm)
    assert seen == []
    pd.testing.assert_frame_equal(again, first)


def test_topk_gives_the_rows_nearest_to_a_query(llm: LLM) -> None:
    frame = pd.DataFrame({"text": [None, *REVIEWS], "n": range(5)}, index=list("vwxyz"))
    result = frame.llm.topk("text", 2, query=QUESTIONS[1])
    expected = cosine(llm, QUESTIONS[1:2], REVIEWS)[0]
    order = np.argsort(-expected)[:2]
    assert result.index.tolist() == ["wxyz"[row] for row in order]
    np.testing.assert_allclose(result["similarity"], expected[order], atol=1e-5)
    assert len(frame.llm.topk("text", 99, query="x")) == 4
    assert len(frame.llm.topk("text", 0, query="x")) == 0
    async_result = asyncio.run(frame.llm.atopk("text", 2, query=QUESTIONS[1]))
    pd.testing.assert_frame_equal(async_result, result)


def test_dedup_keeps_the_first_of_each_group(llm: LLM) -> None:
    texts = [REVIEWS[0], REVIEWS[1], REVIEWS[0], None, REVIEWS[1], None]
    frame = pd.DataFrame({"text": texts, "n": range(6)}, index=[3, 1, 4, 1, 5, 9])
    before = frame.copy()
    result = frame.llm.dedup("text", 0.999)
    pd.testing.assert_frame_equal(result, frame.iloc[[0, 1, 3, 5]])
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(asyncio.run(frame.llm.adedup("text", 0.999)), result)
    assert len(frame.llm.dedup("text", -1.0)) == 3


def test_rows_that_are_linked_by_another_are_one_group() -> None:
    angles = np.deg2rad([0, 50, 25, 120])  # the third one links the first two
    frame = pd.DataFrame({"v": [np.array([np.cos(a), np.sin(a)]) for a in angles]})
    assert frame.llm.dedup("v", np.cos(np.deg2rad(30))).index.tolist() == [0, 3]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(0, 99))
def test_blocks_find_what_one_product_does(rows: int, columns: int, k: int, seed: int) -> None:
    # Few values in few dimensions: many similarities are equal.
    generator = np.random.default_rng(seed)
    left, right = (
        torch.from_numpy(generator.integers(-1, 2, (n, 2)).astype(np.float32))
        for n in (rows, columns)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_ROWS", 7)
        patch.setattr(blocks, "_COLUMNS", 5)
        found, similarity = nearest(left, right, k, "right_on")
        groups = similar_groups(left, 1.0)
    products = (left @ right.T).clamp(-1, 1).numpy()
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, expected.reshape(found.shape))
    np.testing.assert_array_equal(similarity, np.take_along_axis(products, found, axis=1))
    np.testing.assert_array_equal(groups, groups_by_search(left.numpy() @ left.numpy().T >= 1.0))


def groups_by_search(linked: np.ndarray) -> np.ndarray:
    first = np.full(len(linked), -1)
    for start in range(len(linked)):
        waiting = [start] if first[start] < 0 else []
        while waiting:
            row = waiting.pop()
            if first[row] < 0:
                first[row] = start
                waiting += [other for other in np.flatnonzero(linked[row]) if other != row]
    return first


def test_thousands_of_copies_are_one_group() -> None:
    vectors = units(3, 8)[torch.arange(5_000) % 3]
    assert np.unique(similar_groups(vectors, 0.999)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("how", ["inner", "left"])
def test_empty_sides_join_to_nothing(llm: LLM, how: str) -> None:
    some = pd.DataFrame({"text": REVIEWS, "n": range(4)})
    none = some.iloc[:0]
    result = some.llm.sim_join(none, "text", how=how)
    assert list(result.columns) == ["text_x", "n_x", "text_y", "n_y", "similarity"]
    assert len(result) == (4 if how == "left" else 0)
    assert len(none.llm.sim_join(some, "text", how=how)) == 0
    assert len(none.llm.dedup("text")) == len(none.llm.topk("text", 3, query="x")) == 0


def test_other_columns_may_occur_twice(llm: LLM) -> None:
    frame = pd.DataFrame([["a", "b", REVIEWS[0]]], columns=["q", "q", "text"])
    result = frame.llm.sim_join(frame, "text", suffixes=("", "_other"))
    names = ["q", "q", "text", "q_other", "q_other", "text_other", "similarity"]
    assert list(result.columns) == names


def test_a_text_that_fails_has_no_partner(llm: LLM) -> None:
    frame = pd.DataFrame({"text": [REVIEWS[0], "word " * 5000]})
    with pytest.warns(UserWarning, match="1 of 2 rows failed"):
        result = frame.llm.sim_join(pd.DataFrame({"b": REVIEWS}), "text", "b", how="left")
    assert result["b"].isna().tolist() == [False, True]
    with pytest.raises(InvalidRequestError, match="1024"):
        frame.llm.dedup("text", errors="raise")


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"k": 0}, "k"),
        ({"how": "outer"}, "how"),
        ({"min_similarity": 2.0}, "min_similarity"),
        ({"errors": "column"}, "errors"),
        ({"on_interrupt": "return"}, "on_interrupt"),
        ({"out": "n"}, "out"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_a_wrong_argument_is_named(llm: LLM, options: dict[str, Any], parameter: str) -> None:
    frame = pd.DataFrame({"text": REVIEWS, "n": range(4)})
    with pytest.raises(InvalidRequestError) as caught:
        frame.llm.sim_join(frame, "text", **options)
    assert caught.value.parameter == parameter
    with pytest.raises(TypeError, match="colour"):
        frame.llm.sim_join(frame, "text", colour="red")
    with pytest.raises(InvalidRequestError) as caught:
        frame.llm.topk("text", 1, query=3)
    assert caught.value.parameter == "query"
