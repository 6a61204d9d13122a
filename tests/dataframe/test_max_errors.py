"""max_errors: a call that goes wrong stops early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

import nbllm
from nbllm import LLM, InvalidRequestError, RequestFailedError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
LONG = "word " * 4000


@pytest.fixture
def frame() -> pd.DataFrame:
    """Every other row fails; the last ones would take long."""
    return pd.DataFrame({"q": [f"What is {i} + 1?" if i % 2 else f"{i} {LONG}" for i in range(8)]})


def run(frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
    answered: pd.DataFrame = frame.llm.generate("q", GREEDY, order="given", **options)
    return answered


def submit(frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
    answered: pd.DataFrame = frame.llm.submit("q", GREEDY, order="given", **options).result()
    return answered


def agenerate(frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
    answered: pd.DataFrame = asyncio.run(frame.llm.agenerate("q", GREEDY, order="given", **options))
    return answered


def stream(frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
    return pd.concat(frame.llm.stream("q", GREEDY, order="given", **options)).sort_index()


WAYS = [run, submit, agenerate, stream]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("limit", "num_failed"), [(0, 1), (2, 3), (0.25, 3), (0.3, 3), (0.0, 1)])
def test_a_call_stops_once_more_rows_have_failed(
    llm: LLM, frame: pd.DataFrame, way: Callable[..., Any], limit: float, num_failed: int
) -> None:
    before = llm.get_metrics()["generation_tokens"]
    message = f"^{num_failed} of 8 rows failed, more than max_errors allows; the first: the prompt"
    with pytest.raises(RequestFailedError, match=message) as caught:
        way(frame, max_errors=limit)
    assert caught.value.parameter == "max_errors"
    assert isinstance(caught.value.__cause__, InvalidRequestError)
    while llm.get_metrics()["num_requests_running"]:  # what was under way is let go of
        pass
    assert llm.get_metrics()["generation_tokens"] - before <= 4 * 4
    if way is not stream:
        assert nbllm.last["llm_error"].notna().sum() == num_failed
    assert run(frame.iloc[1::2])["llm"].notna().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limit", [None, 4, 100, 0.5, 0.99])
def test_as_many_failed_rows_as_are_allowed_change_nothing(
    llm: LLM, frame: pd.DataFrame, way: Callable[..., Any], limit: float | None
) -> None:
    answered = way(frame, max_errors=limit)
    pd.testing.assert_frame_equal(answered, run(frame))
    assert answered["llm_error"].notna().sum() == 4


def test_what_had_ended_is_kept_and_the_rest_may_be_tried_again(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 1 + 1?"] + ["x"] * 300 + [LONG]})
    answer = frame.head(1).llm.generate("q", GREEDY)["llm"][0]
    with pytest.raises(RequestFailedError):
        run(frame, max_errors=0, dedupe=False)
    left = nbllm.last
    assert left["llm_error"].notna().sum() == 1 and left["llm_error"].notna().iloc[-1]
    left["q"] = left["q"].replace(LONG, "What is 1 + 1?")
    again = left.llm.retry(column_or_template="q", sampling_params=GREEDY, max_errors=0)
    assert again["llm"].iloc[[0, -1]].tolist() == [answer] * 2
    assert again["llm"].notna().all() and again["llm_error"].isna().all()


def test_rows_that_fail_with_their_twin_count_each(llm: LLM) -> None:
    frame = pd.DataFrame({"q": [LONG, LONG, LONG, "What is 1 + 1?"]})
    with pytest.raises(RequestFailedError, match="3 of 4 rows failed"):
        run(frame, max_errors=2)
    assert run(frame, max_errors=3)["llm"].notna().sum() == 1


@pytest.mark.parametrize("way", [run, submit])
def test_prompts_that_can_not_be_made_count(llm: LLM, way: Callable[..., Any]) -> None:
    frame = pd.DataFrame({"q": [[1], "What is 1 + 1?", {"x": 1}, {"y": 1}]})
    with pytest.raises(RequestFailedError, match="2 of 4 rows failed"):
        way(frame, max_errors=1)
    assert nbllm.last["llm_error"].notna().sum() == 2


def test_rows_without_a_value_are_no_part_of_a_share(llm: LLM) -> None:
    frame = pd.DataFrame({"q": [LONG, "What is 1 + 1?", None, None, None, None]})
    with pytest.raises(RequestFailedError, match="1 of 2 rows failed"):
        run(frame, max_errors=0.4)
    assert run(frame, max_errors=0.5)["llm"].notna().sum() == 1


def test_other_verbs_and_series_stop_too(llm: LLM, frame: pd.DataFrame) -> None:
    for call in (
        lambda: frame.llm.classify("q", ["a", "b"], max_errors=1),
        lambda: frame.llm.extract("q", {"sum": int}, max_errors=1),
        lambda: frame.llm.embed("q", max_errors=1),
        lambda: frame["q"].llm.generate(None, GREEDY, max_errors=1),
    ):
        with pytest.raises(RequestFailedError, match="max_errors"):
            call()


@pytest.mark.parametrize("limit", [-1, 1.0, 1.5, -0.1, float("nan"), True, "3"])
def test_a_limit_that_is_none_is_named(frame: pd.DataFrame, limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_errors must be") as caught:
        frame.llm.generate("q", max_errors=limit)
    assert caught.value.parameter == "max_errors"
