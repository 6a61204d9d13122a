"""df.llm.generate on frames of any kind: a right result or a clear error, and nothing changed."""

from __future__ import annotations

import copy
import datetime as dt
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nbllm import LLM, InvalidRequestError, SamplingParams

ONE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
TEXTS = st.text(st.characters(), max_size=8)  # lone surrogates and emoji among them
CELLS = st.one_of(
    TEXTS,
    st.sampled_from(
        [None, np.nan, pd.NA, pd.NaT, b"bytes", (), [], {}, object, 1e300, -0.0, 10**30]
    ),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)),
    st.lists(st.integers(-5, 4000), max_size=3),
    st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=2),
    st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids", "x"]), TEXTS, max_size=1),
)
PROPERTIES = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@PROPERTIES
@given(cells=st.lists(CELLS, max_size=5), chat=st.booleans())
@example(cells=[[-1], [2**70]], chat=False)
def test_any_cell_gives_an_answer_or_its_error(llm: LLM, cells: list[Any], chat: bool) -> None:
    values = np.empty(len(cells), dtype=object)
    values[:] = cells
    frame = pd.DataFrame({"q": pd.Series(values, dtype=object)})
    before = copy.deepcopy(cells)
    answered = frame.llm.generate("q", ONE, chat=chat)
    assert answered.index.equals(frame.index)
    for cell, was, text, error in zip(
        frame["q"], before, answered["llm"], answered["llm_error"], strict=True
    ):
        assert cell is was or repr(cell) == repr(was)
        missing = pd.api.types.is_scalar(cell) and pd.isna(cell)
        assert pd.isna(text) if missing else pd.isna(text) != pd.isna(error)
        assert not missing or pd.isna(error)


@PROPERTIES
@given(
    dtype=st.sampled_from(
        ["Int64", "Float64", "boolean", "string", "category", "datetime64[ns]", "timedelta64[ns]"]
    ),
    data=st.data(),
)
def test_any_dtype_can_be_read_by_a_template(llm: LLM, dtype: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([0, 1, None]), max_size=4))
    column = pd.Series(pd.array(values, dtype="Int64")).astype(object)
    column = column.map(str, na_action="ignore") if dtype in ("string", "category") else column
    frame = pd.DataFrame({"x": column.astype(dtype), "y": range(len(values))})
    before = frame.copy(deep=True)
    answered = frame.llm.generate("{x} and {y}", ONE, chat=False, template_format="f-string")
    pd.testing.assert_frame_equal(frame, before)
    assert answered["llm"].isna().tolist() == [value is None for value in values]
    assert answered["llm_error"].isna().all()
    expected = [f"{x} and {y}" for x, y in zip(frame["x"], frame["y"], strict=True)]
    for text, row in zip(expected, answered["llm"], strict=True):
        if not pd.isna(row):
            assert row == llm.generate(text, ONE)[0].outputs[0].text


def test_a_frame_of_missing_values_is_answered_with_missing_values(llm: LLM) -> None:
    frame = pd.DataFrame({"q": [None, np.nan, pd.NA]})
    answered = frame.llm.generate("q", ONE)
    assert answered["llm"].isna().all() and answered["llm_error"].isna().all()
    assert str(answered["llm"].dtype) == "string"


def test_a_cell_of_a_million_letters_fails_alone(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["a" * 10**6, "fine"]})
    answered = frame.llm.generate("q", ONE)
    assert answered["llm"].isna().tolist() == [True, False]
    assert "max_model_len" in answered["llm_error"][0] or "long" in answered["llm_error"][0]


@pytest.mark.parametrize(
    "columns",
    [[1, 2], [None, "q"], [dt.date(2020, 1, 1), "q"]],
    ids=["numbers", "None", "dates"],
)
def test_columns_may_have_any_names(llm: LLM, columns: list[Any]) -> None:
    frame = pd.DataFrame([["What is 1 + 1?", "b"]], columns=pd.Index(columns))
    answered = frame.llm.generate(columns[0], ONE, errors="warn")
    assert answered.iloc[0, -1] == frame.iloc[:, 0].llm.generate(None, ONE).iloc[0]
    assert answered.shape == (1, 3)


def test_names_of_several_levels_are_refused(llm: LLM) -> None:
    frame = pd.DataFrame([["x", "y"]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")]))
    with pytest.raises(InvalidRequestError, match="2 levels"):
        frame.llm.generate(("a", "b"), ONE)


def test_names_that_occur_twice_are_refused_where_they_are_needed(llm: LLM) -> None:
    frame = pd.DataFrame([["x", "y", "What is 1 + 1?"]], columns=["a", "a", "q"])
    assert frame.llm.generate("q", ONE)["llm"].notna().all()
    for template in ("{a}", lambda row: row["q"]):
        with pytest.raises(InvalidRequestError, match="occurs 2 times") as caught:
            frame.llm.generate(template, ONE)
        assert caught.value.parameter == "column_or_template"
