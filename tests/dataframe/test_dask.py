"""nbllm.dask: the verbs on the partitions of a Dask frame."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import nbllm
import nbllm.dask
from nbllm import LLM, InvalidRequestError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
QUESTIONS = ["What is the capital of France?", "What is 3 + 4?", None, "What is 17 + 25?", "Hi!"]
ENGINE = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"q": QUESTIONS, "n": range(5)}, index=pd.Index(range(10, 15), name="i"))


@pytest.fixture
def engines() -> Iterator[dict[str, LLM]]:
    """Those that this process makes, closed at the end."""
    yield nbllm.dask._engines
    for llm in nbllm.dask._engines.values():
        llm.close()
    nbllm.dask._engines.clear()


def test_partitions_are_answered_as_the_whole_frame_is(llm: LLM, frame: pd.DataFrame) -> None:
    parts = dd.from_pandas(frame, npartitions=3)
    result = nbllm.dask.generate(parts, "q", GREEDY, out="a", include=["usage"])
    expected = frame.llm.generate("q", GREEDY, out="a", include=["usage"])
    assert list(result.columns) == list(expected.columns)
    assert result.divisions == parts.divisions
    computed = result.compute()
    for name in expected.columns[2:]:
        pd.testing.assert_series_equal(computed[name], expected[name], check_dtype=False)
    assert computed.index.equals(frame.index)
    assert (result.dtypes["a_prompt_tokens"], result.dtypes["a"]) == ("Int64", "string")


def test_nothing_is_computed_before_it_is_asked_for(llm: LLM, frame: pd.DataFrame) -> None:
    before = llm.get_metrics()["prompt_tokens"]
    parts = dd.from_pandas(frame, npartitions=2)
    embedded = nbllm.dask.embed(nbllm.dask.generate(parts, "q", GREEDY, out="a"), "a")
    assert llm.get_metrics()["prompt_tokens"] == before
    vectors = embedded.compute()["embedding"]
    assert [isinstance(v, np.ndarray) for v in vectors] == [True, True, False, True, True]


def test_a_wrong_argument_is_named_before_anything_runs(llm: LLM, frame: pd.DataFrame) -> None:
    parts = dd.from_pandas(frame, npartitions=2)
    with pytest.raises(InvalidRequestError, match="no column 'text'") as caught:
        nbllm.dask.generate(parts, "{text}", GREEDY)
    assert caught.value.parameter == "column_or_template"
    with pytest.raises(InvalidRequestError) as caught:
        nbllm.dask.generate(parts, "q", GREEDY, journal="faq")
    assert caught.value.parameter == "journal"


def test_an_engine_is_made_once_in_a_process(
    llm: LLM, frame: pd.DataFrame, engines: dict[str, LLM]
) -> None:
    parts = dd.from_pandas(frame, npartitions=3)
    expected = nbllm.dask.generate(parts, "q", GREEDY).compute()
    result = nbllm.dask.generate(parts, "q", GREEDY, llm=ENGINE).compute()
    pd.testing.assert_frame_equal(result, expected)
    (made,) = engines.values()
    assert made is not llm
    made.close()  # as a notebook's cell does that is run again
    pd.testing.assert_frame_equal(
        nbllm.dask.generate(parts, "q", GREEDY, llm=ENGINE).compute(), expected
    )


def test_an_open_engine_is_not_sent_to_another_process(llm: LLM) -> None:
    step = nbllm.dask.Step("generate", ("q", GREEDY), {}, llm)
    with pytest.raises(InvalidRequestError, match="each worker makes one") as caught:
        pickle.dumps(step)
    assert caught.value.parameter == "llm"
    assert pickle.loads(pickle.dumps(nbllm.dask.Step("generate", ("q", GREEDY), {}, ENGINE)))


@pytest.mark.slow
def test_worker_processes_make_engines_of_their_own(llm: LLM, frame: pd.DataFrame) -> None:
    parts = dd.from_pandas(frame, npartitions=4)
    result = nbllm.dask.generate(parts, "q", GREEDY, llm=ENGINE)
    expected = nbllm.dask.generate(parts, "q", GREEDY).compute()
    computed: Any = result.compute(scheduler="processes", num_workers=2)
    pd.testing.assert_frame_equal(computed, expected)


def test_without_dask_the_error_says_what_to_install(
    frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dask.dataframe", None)
    with pytest.raises(ImportError, match=r"pip install 'nbllm\[dask\]'"):
        nbllm.dask.generate(frame, "q")
