"""score, filter, threshold, coverage: numbers and cuts out of the probabilities of labels."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbllm
from nbllm import InvalidRequestError

pytestmark = pytest.mark.usefixtures("llm")

REVIEWS = [
    "The food was wonderful and the staff friendly.",
    "The room was dirty and the staff rude.",
    "It was okay, nothing special.",
]


@pytest.fixture
def frame() -> pd.DataFrame:
    """Five rows, of which one is missing and one is too long; labels of the index occur twice."""
    texts = [*REVIEWS, None, "word " * 2000]
    return pd.DataFrame({"review": texts, "id": range(5)}, index=[7, 7, 1, 2, 3])


def test_a_score_is_the_expected_value(frame: pd.DataFrame) -> None:
    scale = {"positive": 1.0, "neutral": 0.5, "negative": 0.0}
    result = frame.llm.score("review", scale)
    p = frame.llm.classify("review", list(scale), include="all")
    expected = sum(p[f"label_p[{label}]"] * number for label, number in scale.items())
    assert result["score"].tolist()[:3] == pytest.approx(expected.tolist()[:3])
    assert result["score"].isna().tolist() == [False] * 3 + [True] * 2
    ask: dict[str, Any] = {"column_or_template": "Is it good? {review}", "instruction": ""}
    yes = frame.llm.score(**ask, out="good")["good"]
    no = frame.llm.score(**ask, scale={"no": 1, "yes": 0})["score"]
    assert (yes + no).tolist()[:3] == pytest.approx([1, 1, 1])
    for wrong in ({"a": "x", "b": 1}, ["a", "b"], {"a": float("nan"), "b": 1}):
        with pytest.raises(InvalidRequestError) as caught:
            frame.llm.score("review", wrong)
        assert caught.value.parameter == "scale"


def test_a_filter_keeps_the_rows_that_are_so(frame: pd.DataFrame) -> None:
    ask: dict[str, Any] = {"labels": ("positive", "negative")}
    message = "2 rows have no answer and are dropped: 1 with missing values, 1 that failed"
    with pytest.warns(UserWarning, match=message) as caught:
        kept = frame.llm.filter("review", **ask)
    assert caught[0].filename == __file__
    scores = frame.llm.score("review", {"positive": 1, "negative": 0})["score"]
    pd.testing.assert_frame_equal(kept, frame[(scores > 0.5).fillna(False).to_numpy()])
    assert 7 in kept.index and "rude" not in " ".join(kept["review"])
    fine = frame.iloc[:3]
    low = fine.llm.filter("review", 0.0, keep_scores=True, out="good", **ask)
    assert low["good_p"].tolist() == pytest.approx(scores.tolist()[:3])
    pd.testing.assert_frame_equal(
        low.llm.threshold("good", 0.5),
        fine.llm.filter("review", keep_scores=True, out="good", **ask),
    )
    assert nbllm.reproduce(low, "good_p")["now"].tolist() == pytest.approx(low["good_p"].tolist())
    with pytest.raises(InvalidRequestError, match="max_model_len is 1024"):
        frame.llm.filter("review", errors="raise", **ask)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"threshold": 2}, "threshold"),
        ({"errors": "column"}, "errors"),
        ({"labels": ["a", "b", "c"]}, "labels"),
        ({"out": "id", "keep_scores": True}, "out"),
    ],
)
def test_wrong_arguments_of_filter_are_named(
    frame: pd.DataFrame, options: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        frame.assign(id_p=1.0).llm.filter("review", **options)
    assert caught.value.parameter == parameter


PROBABILITY = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0]))


@given(
    rows=st.lists(
        st.tuples(PROBABILITY, st.sampled_from(["a", "b"]), st.sampled_from(["a", "b", None])),
        max_size=8,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_threshold_and_coverage_agree_with_a_count(rows: list[tuple[Any, Any, Any]]) -> None:
    frame = pd.DataFrame(
        {
            "mood": pd.Categorical([None if p is None else m for p, m, _ in rows], ["a", "b"]),
            "mood_p": pd.array([p for p, _, _ in rows], dtype="Float64"),
            "truth": pd.array([t for _, _, t in rows], dtype="string"),
        },
        index=[0] * len(rows),
    )
    curve = frame.llm.coverage("mood", truth="truth")
    ps = sorted({p for p, _, _ in rows if p is not None})
    assert curve["threshold"].tolist() == ps
    for at, coverage, precision in curve.itertuples(index=False):
        covered = [(m, t) for p, m, t in rows if p is not None and p >= at]
        assert coverage == pytest.approx(len(covered) / len(rows))
        known = [m == t for m, t in covered if t is not None]
        right = sum(known) / len(known) if known else float("nan")
        assert precision == pytest.approx(right, nan_ok=True)
        cut = frame.llm.threshold("mood", at, other="unsure")
        assert cut["mood"].dropna().ne("unsure").sum() == len(covered)
        missing = frame.llm.threshold("mood", at)["mood"]
        assert missing.notna().sum() == len(covered)
        assert list(missing.cat.categories) == ["a", "b"]


def test_threshold_and_coverage_ask_for_columns_that_are_there(frame: pd.DataFrame) -> None:
    for call in (lambda: frame.llm.threshold("mood", 0.5), lambda: frame.llm.coverage("mood")):
        with pytest.raises(InvalidRequestError, match="'mood_p'") as caught:
            call()
        assert caught.value.parameter == "column"
    scored = frame.assign(mood_p=0.5)
    with pytest.raises(InvalidRequestError, match="from 0 to 1"):
        scored.llm.threshold("mood", -1)
    with pytest.raises(InvalidRequestError, match="truth"):
        scored.llm.coverage("mood", truth="truth")
    curve = scored.assign(truth=[True, False, True, None, True]).llm.coverage("mood", "truth")
    assert curve.to_dict("list") == {"threshold": [0.5], "coverage": [1.0], "precision": [0.75]}


def test_columns_of_several_levels_can_be_filtered_but_not_added_to() -> None:
    columns = pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")], names=["x", "y"])
    frame = pd.DataFrame([[REVIEWS[0], 1], [REVIEWS[1], 2]], columns=columns)
    kept = frame.llm.filter(("a", "b"), labels=("positive", "negative"))
    pd.testing.assert_frame_equal(kept, frame.iloc[:1])
    with pytest.raises(InvalidRequestError, match="2 levels"):
        frame.llm.score(("a", "b"))
