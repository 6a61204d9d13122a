"""df.llm.generate: the caller's rows, order and index; a bad row costs nobody else anything."""

from __future__ import annotations

import _thread
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbllm
from nbllm import LLM, Interrupted, InvalidRequestError, SamplingParams

QUESTIONS = ["What is the capital of France?", "What is 17 + 25?", "What is the capital of Italy?"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture
def frame(llm: LLM) -> pd.DataFrame:
    return pd.DataFrame({"question": QUESTIONS, "id": [7, 8, 9]})


def answer(llm: LLM, text: str) -> str:
    prompt = llm.encode_chat([{"role": "user", "content": text}])
    return llm.generate(prompt, GREEDY)[0].outputs[0].text


def test_a_column_is_answered_in_a_new_frame(llm: LLM, frame: pd.DataFrame) -> None:
    before = frame.copy()
    result = frame.llm.generate("question", GREEDY, out="answer")
    assert list(result.columns) == ["question", "id", "answer", "answer_error"]
    assert list(result["answer"]) == [answer(llm, question) for question in QUESTIONS]
    assert "Paris" in result["answer"][0]
    assert result["answer_error"].isna().all()
    pd.testing.assert_frame_equal(frame, before)


def test_a_template_is_filled_from_the_columns(llm: LLM) -> None:
    frame = pd.DataFrame({"a": [17, 3], "b": [25.0, 4.0]})
    result = frame.llm.generate("What is {a} + {b:.0f}?", GREEDY)
    assert list(result["llm"]) == [answer(llm, "What is 17 + 25?"), answer(llm, "What is 3 + 4?")]


def test_without_the_chat_template_the_prompt_goes_as_it_is(llm: LLM, frame: pd.DataFrame) -> None:
    result = frame.llm.generate("question", GREEDY, chat=False)
    expected = [o.outputs[0].text for o in llm.generate(QUESTIONS, GREEDY, use_tqdm=False)]
    assert list(result["llm"]) == expected


def test_a_series_gives_a_series(llm: LLM) -> None:
    countries = pd.Series(["France", None, "Italy"], index=[3, 1, 1], name="country")
    result = countries.llm.generate("What is the capital of {}?", GREEDY)
    assert result.name == "country"
    assert result.index.equals(countries.index)
    assert result.iloc[0] == answer(llm, QUESTIONS[0])
    assert result.iloc[1] is pd.NA
    assert result.iloc[2] == answer(llm, QUESTIONS[2])


@given(data=st.data())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_answers_stand_at_their_rows_whatever_the_index(llm: LLM, data: st.DataObject) -> None:
    words = ["France", "Italy", "Spain", None, float("nan"), pd.NA]
    values = data.draw(st.lists(st.sampled_from(words), max_size=8))
    labels = data.draw(
        st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))
    )  # duplicates, in any order
    frame = pd.DataFrame({"country": pd.Series(values, dtype=object)})
    frame.index = pd.Index(labels, name="key", dtype="int64")
    if data.draw(st.booleans()):
        frame.index = pd.MultiIndex.from_arrays([labels, labels[::-1]], names=["x", "y"])
    result = frame.llm.generate("{country}", SamplingParams(temperature=0.0, max_tokens=3))
    assert result.index.equals(frame.index)
    assert result.index.names == frame.index.names
    for value, text in zip(values, result["llm"], strict=True):
        if isinstance(value, str):
            prompt = llm.encode_chat([{"role": "user", "content": value}])
            alone = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=3))[0]
            assert text == alone.outputs[0].text
        else:
            assert text is pd.NA


def test_a_bad_row_has_no_answer_and_its_error(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 17 + 25?", "word " * 5000, [], "What is 3 + 4?"]})
    result = frame.llm.generate("q", GREEDY, out="a")
    assert list(result["a"].isna()) == [False, True, True, False]
    assert list(result["a_error"].isna()) == [True, False, False, True]
    assert "1024" in result["a_error"][1]
    with pytest.warns(UserWarning, match="2 of 4 rows failed"):
        assert "a_error" not in frame.llm.generate("q", GREEDY, out="a", errors="warn")
    with pytest.raises(InvalidRequestError):
        frame.llm.generate("q", GREEDY, out="a", errors="raise")
    assert list(nbllm.last["a"].isna()) == [False, True, True, False]


def test_a_row_that_a_format_does_not_suit_fails_alone(llm: LLM) -> None:
    frame = pd.DataFrame({"x": [1.5, "high"]}, dtype=object)
    result = frame.llm.generate("{x:.1f}", GREEDY)
    assert "does not suit" in result["llm_error"][1]
    assert result["llm_error"].isna()[0]


def test_an_existing_column_is_never_replaced_silently(frame: pd.DataFrame) -> None:
    done = frame.llm.generate("question", GREEDY, out="answer")
    with pytest.raises(InvalidRequestError, match="overwrite=True") as caught:
        done.llm.generate("question", GREEDY, out="answer")
    assert caught.value.parameter == "out"


def test_overwrite_answers_only_what_has_no_answer(frame: pd.DataFrame) -> None:
    frame["answer"] = ["kept", None, pd.NA]
    result = frame.llm.generate("question", GREEDY, out="answer", overwrite=True)
    assert result["answer"][0] == "kept"
    assert "42" in result["answer"][1]
    assert "Rome" in result["answer"][2]


def test_several_continuations_come_as_lists(frame: pd.DataFrame) -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=8)
    result = frame.llm.generate("question", params)
    assert all(isinstance(texts, list) and len(texts) == 2 for texts in result["llm"])


def test_messages_and_token_ids_may_stand_in_cells(llm: LLM) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    ids = llm.get_tokenizer().encode(QUESTIONS[1])
    frame = pd.DataFrame({"prompt": [messages, ids]})
    result = frame.llm.generate("prompt", GREEDY)
    assert result["llm"][0] == answer(llm, QUESTIONS[0])
    assert result["llm"][1] == llm.generate(ids, GREEDY)[0].outputs[0].text


def test_an_empty_frame_gets_an_empty_column(llm: LLM) -> None:
    frame = pd.DataFrame({"q": pd.Series([], dtype=object)})
    assert list(frame.llm.generate("q").columns) == ["q", "llm", "llm_error"]


@pytest.mark.parametrize(
    ("arguments", "options", "parameter", "message"),
    [
        (("questoin",), {}, "column_or_template", "did you mean 'question'"),
        (("{questoin}",), {}, "column_or_template", "did you mean 'question'"),
        (("{question",), {}, "column_or_template", "no template"),
        (("question",), {"na": "drop"}, "na", "'skip', 'fill', 'raise'"),
        (("question",), {"errors": "hide"}, "errors", "'column'"),
        (("question",), {"chat": "maybe"}, "chat", "'auto'"),
        (("question", [GREEDY]), {}, "sampling_params", "1 entries for 3 rows"),
    ],
)
def test_a_wrong_argument_is_named(
    frame: pd.DataFrame, arguments: Any, options: dict[str, Any], parameter: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        frame.llm.generate(*arguments, **options)
    assert caught.value.parameter == parameter


def test_a_column_that_occurs_twice_is_refused(llm: LLM) -> None:
    frame = pd.DataFrame([["x", "y"]], columns=["q", "q"])
    with pytest.raises(InvalidRequestError, match="occurs 2 times"):
        frame.llm.generate("q")


def test_missing_values_can_be_refused(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["x", np.nan]})
    with pytest.raises(InvalidRequestError, match="1 rows have missing values"):
        frame.llm.generate("q", na="raise")


def test_rows_that_begin_alike_reach_the_engine_one_after_the_other(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = pd.DataFrame({"q": ["Name a fruit.", "Add 3 and 4.", None, "Name a bird.", "Add 5."]})
    seen: list[Any] = []
    call = llm._call

    def spy(rows: Any) -> Any:
        rows = list(rows)
        seen.extend(prompt.text for prompt, _, _ in rows)
        return call(rows)

    monkeypatch.setattr(llm, "_call", spy)
    result = frame.llm.generate("q", GREEDY, chat=False, llm=llm)
    monkeypatch.undo()
    assert seen == ["Add 3 and 4.", "Add 5.", "Name a bird.", "Name a fruit."]
    alone = [llm.generate(q, GREEDY)[0].outputs[0].text for q in frame["q"].dropna()]
    assert result["llm"].dropna().tolist() == alone


def test_an_interrupt_keeps_the_rows_that_are_done(llm: LLM, interrupting_bar: Any) -> None:
    frame = pd.DataFrame({"q": [QUESTIONS[0], "Once upon a time"]})
    params = [GREEDY, SamplingParams(temperature=1.0, seed=1, max_tokens=900, ignore_eos=True)]
    with pytest.raises(Interrupted) as caught:
        frame.llm.generate("q", params, out="a", use_tqdm=interrupting_bar)
    assert nbllm.last is caught.value.partial
    assert list(nbllm.last["a"].isna()) == [False, True]
    assert nbllm.last["a_error"][1] == "interrupted"
    returned = frame.llm.generate(
        "q", params, out="a", use_tqdm=interrupting_bar, on_interrupt="return"
    )
    pd.testing.assert_frame_equal(returned, nbllm.last)
    assert llm.get_metrics()["num_requests_running"] == 0


@pytest.mark.parametrize("on_interrupt", ["raise", "return"])
def test_more_interrupts_while_one_is_handled_change_nothing(
    llm: LLM, interrupting_bar: Any, on_interrupt: str
) -> None:
    class Impatient(interrupting_bar):  # type: ignore[misc]
        def close(self) -> None:
            _thread.interrupt_main()

    frame = pd.DataFrame({"q": [QUESTIONS[0], "Once upon a time"]})
    params = [GREEDY, SamplingParams(temperature=1.0, seed=1, max_tokens=900, ignore_eos=True)]
    asked: dict[str, Any] = {"journal": "cut", "on_interrupt": on_interrupt}
    nbllm.last = None
    if on_interrupt == "raise":
        with pytest.raises(Interrupted) as caught:
            frame.llm.generate("q", params, use_tqdm=Impatient, **asked)
        assert caught.value.partial is nbllm.last
    else:
        assert frame.llm.generate("q", params, use_tqdm=Impatient, **asked) is nbllm.last
    assert list(nbllm.last["llm"].isna()) == [False, True]
    assert nbllm.last["llm_error"][1] == "interrupted"
    assert "nbllm-journal" not in [thread.name for thread in threading.enumerate()]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("first", ["pandas", "nbllm"])
def test_the_accessor_is_there_whichever_is_imported_first(first: str) -> None:
    second = {"pandas": "nbllm", "nbllm": "pandas"}[first]
    code = (
        f"import {first}, {second}, pandas, importlib, nbllm, sys\n"
        "assert type(pandas.DataFrame().llm).__name__ == 'DataFrameAccessor'\n"
        "assert type(pandas.Series(dtype=object).llm).__name__ == 'SeriesAccessor'\n"
        "assert not any(getattr(f, 'package', '') == 'pandas' for f in sys.meta_path)\n"
        "assert 'nbllm' not in type(pandas.__spec__.loader).__module__\n"
        "importlib.reload(nbllm)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
