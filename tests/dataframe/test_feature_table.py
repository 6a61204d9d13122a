"""What is said about frames in the table of the README and no other file here tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from pydantic import BaseModel

import nbllm
from nbllm import LLM, Interrupted, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture
def frame() -> pd.DataFrame:
    questions = [f"What is {a} + {b}?" for a in range(4) for b in range(3)]
    return pd.DataFrame({"q": questions}, index=[f"row {i}" for i in range(12)])


def count(llm: LLM, name: str) -> int:
    return int(llm.get_metrics()[name])


def test_each_row_may_have_its_own_seed(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["Once upon a"] * 4, "seed": [7, 8, 9, 7]})
    params = {"temperature": 5.0, "max_tokens": 8, "seed": frame["seed"]}
    answered = frame.llm.generate("q", params, chat=False)
    for seed, text in zip(frame["seed"], answered["llm"], strict=True):
        alone = SamplingParams(temperature=5.0, max_tokens=8, seed=seed)
        assert text == llm.generate("Once upon a", alone)[0].outputs[0].text
    assert answered["llm"].nunique() == 3


def test_several_texts_of_a_row_share_its_prompt(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["Once upon a time there was one who said so, " * 20]})
    params = SamplingParams(temperature=1.0, n=4, max_tokens=4)
    llm.reset_prefix_cache()
    before = count(llm, "prompt_tokens_by_source_local_compute")
    answered = frame.llm.generate("q", params, include=["usage"])
    computed = count(llm, "prompt_tokens_by_source_local_compute") - before
    assert len(answered["llm"][0]) == 4
    length = answered["llm_prompt_tokens"][0]
    block_size = llm.config.block_size
    assert block_size is not None and length > 5 * block_size
    assert computed <= length + 3 * block_size  # whole blocks are shared


def test_what_an_interrupt_has_left_goes_on(
    llm: LLM, frame: pd.DataFrame, interrupting_bar: Any
) -> None:
    lengths = pd.Series([1] + [30] * 11)  # so that most rows go on after the first
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": lengths}
    options: dict[str, Any] = {"out": "sum", "order": "given", "include": ["usage"]}
    whole = frame.llm.generate("q", params, **options)
    with pytest.raises(Interrupted):
        frame.llm.generate("q", params, use_tqdm=interrupting_bar, **options)
    left = nbllm.last
    is_done = left["sum"].notna()
    assert is_done.any()
    assert left["sum"][is_done].equals(whole["sum"][is_done])
    before = count(llm, "generation_tokens")
    again = left.llm.retry(column_or_template="q", sampling_params=params, **options)
    spent = count(llm, "generation_tokens") - before
    pd.testing.assert_frame_equal(again, whole)
    assert spent == whole["sum_completion_tokens"][~is_done].sum()


def test_usage_adds_up_to_what_the_engine_counts(llm: LLM, frame: pd.DataFrame) -> None:
    names = ("prompt_tokens", "generation_tokens")
    before = [count(llm, name) for name in names]
    answered = frame.llm.generate("q", GREEDY, include=["usage"])
    spent = [count(llm, name) - was for name, was in zip(names, before, strict=True)]
    columns = ["llm_prompt_tokens", "llm_completion_tokens"]
    assert [int(answered[column].sum()) for column in columns] == spent


def test_rows_that_begin_alike_share_a_cache_too_small_for_all(llm: LLM) -> None:
    topics = [f"Topic {letter * 3}: " + f"{letter} word " * 60 for letter in "abcd"]
    frame = pd.DataFrame({"q": [topic + str(turn) for turn in range(3) for topic in topics]})
    params = SamplingParams(temperature=0.0, max_tokens=2)
    found, texts = {}, {}
    options: dict[str, Any] = {"max_num_seqs": 2, "num_gpu_blocks_override": 12}
    for order in ("prefix", "given"):
        with LLM(device="cpu", dtype="float32", **options) as small:
            answered = frame.llm.generate("q", params, llm=small, chat=False, order=order)
            found[order] = count(small, "prefix_cache_hits")
            texts[order] = answered["llm"].tolist()
    assert texts["prefix"] == texts["given"]
    assert found["prefix"] > 2 * found["given"]


class Address(BaseModel):
    city: str


class Person(BaseModel):
    name: str
    age: int | None
    mood: Literal["good", "bad"]
    address: Address


def test_typed_columns_keep_their_types_in_parquet(llm: LLM, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["Anna Keller lives in Oslo and works as a teacher.", None]})
    people = frame.llm.extract("text", Person)
    assert people["extract_error"].isna().all()
    people.to_parquet(tmp_path / "people.parquet")
    read = pd.read_parquet(tmp_path / "people.parquet")
    assert read.dtypes.astype(str).to_dict() == people.dtypes.astype(str).to_dict()
    assert {"name", "age", "mood", "address.city"} <= set(read.columns)
    pd.testing.assert_frame_equal(read, people)


def test_a_part_of_a_frame_still_says_how_it_was_made(llm: LLM, frame: pd.DataFrame) -> None:
    answered = frame.llm.generate("q", GREEDY, out="sum")
    part = answered[answered["q"].str.contains(r"\+ 2")].sort_values("q", ascending=False)
    again = pd.concat([part, answered.head(2)])
    assert again.attrs == answered.attrs
    checked = nbllm.reproduce(again, "sum", rows=3)
    assert checked["same"].all()
