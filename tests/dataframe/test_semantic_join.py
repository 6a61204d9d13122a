"""df.llm.join and topk by a question: what `score` says of each pair, or row."""

from __future__ import annotations

import asyncio
from typing import Any

import pandas as pd
import polars as pl
import pytest

from nbllm import LLM, InvalidRequestError

ASK = "Is {city} the capital of {country}? Answer yes or no."


@pytest.fixture
def cities() -> pd.DataFrame:
    return pd.DataFrame(
        {"city": ["Paris", "Rome", None, "Madrid"], "n": range(4)}, index=list("aabc")
    )


@pytest.fixture
def countries() -> pd.DataFrame:
    return pd.DataFrame({"country": ["France", "Italy", "Spain"], "n": [7, 8, 9]})


def every_pair(cities: pd.DataFrame, countries: pd.DataFrame) -> pd.DataFrame:
    """The pairs with p(yes), by pandas and `score`."""
    return cities.merge(countries, how="cross").llm.score(ASK, out="p", errors="warn")


def test_pairs_with_a_yes_are_joined(
    llm: LLM, cities: pd.DataFrame, countries: pd.DataFrame
) -> None:
    pairs = every_pair(cities, countries)
    threshold = float(pairs["p"].median())
    expected = pairs[(pairs["p"] > threshold).fillna(False)].reset_index(drop=True)
    assert 0 < len(expected) < 9
    before = cities.copy()
    result = cities.llm.join(countries, ASK, threshold=threshold, out="p")
    pd.testing.assert_frame_equal(cities, before)
    assert list(result.columns) == ["city", "n_x", "country", "n_y", "p"]
    pd.testing.assert_frame_equal(result, expected, check_dtype=False, atol=1e-5)
    pd.testing.assert_frame_equal(
        asyncio.run(cities.llm.ajoin(countries, ASK, threshold=threshold, out="p")), result
    )
    left = cities.llm.join(countries, ASK, threshold=threshold, out="p", how="left")
    assert set(left["n_x"]) == {0, 1, 2, 3}
    pd.testing.assert_frame_equal(left.dropna().reset_index(drop=True), result, check_dtype=False)
    assert left["country"].isna()[left["n_x"] == 2].all()


def test_only_candidates_are_asked_about(
    llm: LLM, cities: pd.DataFrame, countries: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    call = llm._call

    def spy(rows: Any) -> Any:
        return call(seen.append(row[0]) or row for row in rows)

    on = {"left_on": "city", "right_on": "country", "pooling": "mean"}
    near = cities.llm.sim_join(countries, k=2, **on)
    monkeypatch.setattr(llm, "_call", spy)
    result = cities.llm.join(countries, ASK, threshold=0.0, candidates=2, llm=llm, **on)
    assert result[["n_x", "n_y"]].to_numpy().tolist() == near[["n_x", "n_y"]].to_numpy().tolist()
    asked = {prompt.text or "" for prompt in seen}
    assert len(near) == 6
    questions = [ASK.format(**row) for row in near.to_dict("records")]
    assert all(any(question in text for text in asked) for question in questions)
    assert not any("None" in text or "nan" in text for text in asked)


def test_polars_frames_are_joined_by_a_question(
    llm: LLM, cities: pd.DataFrame, countries: pd.DataFrame
) -> None:
    expected = cities.llm.join(countries, ASK, threshold=0.0)
    left = pl.from_pandas(cities).with_columns(pl.col("n").cast(pl.UInt8))
    result = left.llm.join(pl.from_pandas(countries), ASK, threshold=0.0)
    assert result.columns == list(expected.columns)
    assert result["city"].to_list() == expected["city"].tolist()
    assert result.schema["n_x"] == pl.UInt8


def test_topk_by_a_question_gives_the_likeliest_rows(
    llm: LLM, cities: pd.DataFrame, countries: pd.DataFrame
) -> None:
    pairs = cities.merge(countries, how="cross")
    scores = every_pair(cities, countries)["p"]
    expected = scores.astype(float).sort_values(ascending=False, kind="stable").dropna()
    result = pairs.llm.topk(k=3, question=ASK)
    assert result.index.tolist() == expected.index[:3].tolist()
    assert result["score"].astype(float).tolist() == pytest.approx(expected[:3].tolist())
    assert len(pairs.llm.topk(k=99, question=ASK)) == 9
    pd.testing.assert_frame_equal(asyncio.run(pairs.llm.atopk(k=3, question=ASK)), result)
    with pytest.raises(InvalidRequestError) as caught:
        pairs.llm.topk("city", 3, question=ASK)
    assert caught.value.parameter == "question"


@pytest.mark.parametrize("how", ["inner", "left"])
def test_empty_sides_join_to_nothing(
    llm: LLM, cities: pd.DataFrame, countries: pd.DataFrame, how: str
) -> None:
    result = cities.llm.join(countries.iloc[:0], ASK, how=how)
    assert list(result.columns) == ["city", "n_x", "country", "n_y", "score"]
    assert len(result) == (4 if how == "left" else 0)
    assert len(cities.iloc[:0].llm.join(countries, ASK, how=how)) == 0


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"threshold": 2}, "threshold"),
        ({"candidates": 0, "left_on": "city"}, "candidates"),
        ({"candidates": 2}, "left_on"),
        ({"how": "outer"}, "how"),
        ({"errors": "column"}, "errors"),
        ({"on_interrupt": "return"}, "on_interrupt"),
        ({"max_pairs": 5}, "max_pairs"),
        ({"out": "city"}, "out"),
    ],
)
def test_a_wrong_argument_is_named(
    llm: LLM,
    cities: pd.DataFrame,
    countries: pd.DataFrame,
    options: dict[str, Any],
    parameter: str,
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        cities.llm.join(countries, ASK, **options)
    assert caught.value.parameter == parameter
    with pytest.raises(InvalidRequestError, match="no column 'town'"):
        cities.llm.join(countries, "{town}?")
    with pytest.raises(TypeError, match="colour"):
        cities.llm.join(countries, ASK, colour="red")
