"""Polars' and Arrow's frames have the same verbs, and keep their own types."""

from __future__ import annotations

import asyncio
import datetime
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

import nbllm
from nbllm import LLM, Interrupted, InvalidRequestError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
FRANCE, ITALY = "What is the capital of France?", "What is the capital of Italy?"


@pytest.fixture
def frame(llm: LLM) -> pl.DataFrame:
    """A column of each kind."""
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
    return pl.DataFrame(
        {
            "q": [FRANCE, None, ITALY],
            "small": pl.Series([1, None, 3], dtype=pl.UInt8),
            "kind": pl.Series(["b", "a", "b"], dtype=pl.Enum(["b", "a"])),
            "category": pl.Series(["u", None, "u"], dtype=pl.Categorical),
            "when": pl.Series([now, None, now], dtype=pl.Datetime("us", "UTC")),
            "time": pl.Series([datetime.time(1), None, None]),
            "price": pl.Series(["1.50", "2.25", None]).cast(pl.Decimal(10, 2)),
            "nested": [{"x": [1]}, None, {"x": [2, 3]}],
            "pair": pl.Series([[1.0, 2.0]] * 3, dtype=pl.Array(pl.Float32, 2)),
            "nothing": pl.Series([None] * 3),
        }
    )


def answer(llm: LLM, text: str) -> str:
    prompt = llm.encode_chat([{"role": "user", "content": text}])
    return llm.generate(prompt, GREEDY)[0].outputs[0].text


def test_a_polars_frame_is_answered_and_keeps_its_types(llm: LLM, frame: pl.DataFrame) -> None:
    before = frame.clone()
    result = frame.llm.generate("q", GREEDY, out="a", include=["usage", "conf"])
    assert_frame_equal(frame, before)
    assert_frame_equal(result.select(frame.columns), frame)
    assert result["a"].to_list() == [answer(llm, FRANCE), None, answer(llm, ITALY)]
    new = {name: result.schema[name] for name in result.columns[len(frame.columns) :]}
    assert new == {
        "a": pl.String,
        "a_error": pl.String,
        "a_prompt_tokens": pl.Int64,
        "a_cached_tokens": pl.Int64,
        "a_completion_tokens": pl.Int64,
        "a_conf": pl.Float64,
    }


def test_whole_numbers_stay_whole_in_a_template(llm: LLM, frame: pl.DataFrame) -> None:
    result = frame.llm.generate("What is {small} + 4?", GREEDY)
    assert result["llm"].to_list() == [
        answer(llm, "What is 1 + 4?"),
        None,
        answer(llm, "What is 3 + 4?"),
    ]


def test_several_texts_a_row_are_lists(llm: LLM, frame: pl.DataFrame) -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=8)
    result = frame.llm.generate("q", params, include=["finish"])
    assert result.schema["llm"] == result.schema["llm_finish"] == pl.List(pl.String)
    assert [None if texts is None else len(texts) for texts in result["llm"]] == [2, None, 2]
    exploded = frame.llm.generate("q", params, explode=True)
    assert exploded["llm"].to_list() == result["llm"].explode().to_list()
    assert exploded["kind"].to_list() == ["b", "b", "a", "b", "b"]


@pytest.mark.parametrize(("n", "explode"), [(1, False), (2, False), (2, True)])
def test_log_probabilities_are_lists_of_structs_of_a_known_type(
    llm: LLM, frame: pl.DataFrame, n: int, explode: bool
) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=n, max_tokens=3)
    options: dict[str, Any] = {"include": ["logprobs"], "explode": explode}
    result = frame.llm.generate("q", params, **options)
    token = {"token": pl.String, "token_id": pl.Int64, "logprob": pl.Float64}
    tokens = pl.List(pl.Struct({**token, "top": pl.List(pl.Struct(token))}))
    expected = pl.List(tokens) if n > 1 and not explode else tokens
    assert result.schema["llm_logprobs"] == expected
    assert frame.lazy().llm.generate("q", params, **options).collect_schema() == result.schema
    assert frame.clear().llm.generate("q", params, **options).schema == result.schema
    pandas = frame.to_pandas()[["q"]].llm.generate("q", params, **options)
    assert result["llm_logprobs"].drop_nulls().to_list() == pandas["llm_logprobs"].dropna().tolist()


def test_rows_with_one_text_are_lists_where_others_have_several(
    llm: LLM, frame: pl.DataFrame
) -> None:
    params = {"temperature": 1.0, "seed": 1, "max_tokens": 3, "n": pl.Series([1, 1, 2])}
    result = frame.llm.generate("q", params, include=["logprobs"])
    assert [None if cell is None else len(cell) for cell in result["llm_logprobs"]] == [1, None, 2]


def test_sampling_parameters_may_be_a_polars_series(llm: LLM, frame: pl.DataFrame) -> None:
    params = {"temperature": 0.0, "max_tokens": pl.Series([2, 2, 5])}
    result = frame.llm.generate("q", params, include=["usage"])
    assert result["llm_completion_tokens"].to_list() == [2, None, 5]


def test_vectors_are_arrays_of_float32_and_can_be_compared(llm: LLM, frame: pl.DataFrame) -> None:
    embedded = frame.llm.embed("q")
    assert embedded.schema["embedding"] == pl.Array(pl.Float32, llm.model_config.hidden_size)
    expected = frame["q"].to_pandas().llm.embed()
    np.testing.assert_allclose(embedded["embedding"][0].to_numpy(), expected[0], atol=1e-5)
    assert embedded["embedding"].is_null().to_list() == [False, True, False]
    nearest = embedded.llm.topk("embedding", 1, query=ITALY)
    assert nearest["q"].to_list() == [ITALY]
    assert nearest.schema["similarity"] == pl.Float32
    twice = pl.concat([embedded, embedded])
    assert_frame_equal(twice.llm.dedup("embedding", 0.9999), pl.concat([embedded, embedded[1:2]]))


def test_two_polars_frames_are_joined(llm: LLM, frame: pl.DataFrame) -> None:
    other = pl.DataFrame({"text": [ITALY, "The food was great."], "kind": [1, 2]})
    result = frame.llm.sim_join(other, "q", "text", min_similarity=0.99, how="left")
    assert result["kind_x"].to_list() == ["b", "a", "b"]
    assert result.schema["kind_x"] == frame.schema["kind"]
    assert result["kind_y"].to_list() == [None, None, 1]
    assert result.schema["kind_y"] == pl.Int64
    with pytest.raises(InvalidRequestError) as caught:
        frame.llm.sim_join(other.to_pandas(), "q", "text")
    assert caught.value.parameter == "other"


def test_overwrite_replaces_what_is_missing(llm: LLM) -> None:
    frame = pl.DataFrame({"a": ["kept", None], "q": [ITALY, FRANCE]})
    result = frame.llm.generate("q", GREEDY, out="a", overwrite=True)
    assert result.columns == ["a", "q", "a_error"]
    assert result["a"].to_list() == ["kept", answer(llm, FRANCE)]


def test_asynchronous_twins_give_polars_frames(llm: LLM, frame: pl.DataFrame) -> None:
    result = asyncio.run(frame.llm.agenerate("q", GREEDY))
    assert_frame_equal(result, frame.llm.generate("q", GREEDY))


def test_a_plan_has_its_schema_without_a_token(llm: LLM, frame: pl.DataFrame) -> None:
    before = llm.get_metrics()
    two = SamplingParams(temperature=1.0, n=2, seed=1, max_tokens=4)
    plan = (
        frame.lazy()
        .llm.generate("q", GREEDY, out="a")
        .llm.embed("a", pooling="mean")
        .llm.generate("q", two, out="b")
    )
    schema = plan.collect_schema()
    assert llm.get_metrics()["prompt_tokens"] == before["prompt_tokens"]
    eager = frame.llm.generate("q", GREEDY, out="a").llm.embed("a", pooling="mean")
    eager = eager.llm.generate("q", two, out="b")
    assert schema == eager.schema
    result = plan.collect()
    assert result.schema == schema
    vectors = [f["embedding"].drop_nulls().to_numpy() for f in (result, eager)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    assert_frame_equal(result.drop("embedding"), eager.drop("embedding"))


def test_a_plan_that_is_filtered_or_cut_gives_the_same_rows(llm: LLM, frame: pl.DataFrame) -> None:
    whole = frame.llm.generate("q", GREEDY)
    plan = frame.lazy().llm.generate("q", GREEDY)
    for change in (
        lambda f: f.filter(pl.col("llm").str.contains("Rome")),
        lambda f: f.filter(pl.col("small") == 1).select("llm"),
        lambda f: f.head(1).select("small"),
        lambda f: f.tail(1),
    ):
        assert_frame_equal(change(plan).collect(), change(whole))


def test_plans_have_the_other_verbs_too(llm: LLM, frame: pl.DataFrame) -> None:
    labels = ["city", "number"]
    eager = frame.llm.classify("q", labels)
    plan = frame.lazy().llm.classify("q", labels)
    assert plan.collect_schema() == eager.schema
    assert eager.schema["label"] == pl.Categorical
    assert plan.collect()["label"].to_list() == eager["label"].to_list()
    schema = {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["tags"],
    }
    with pytest.raises(InvalidRequestError, match="'tags' is not known before"):
        frame.lazy().llm.extract("q", schema)


def test_a_wrong_argument_of_a_plan_is_named_at_once(llm: LLM, frame: pl.DataFrame) -> None:
    with pytest.raises(InvalidRequestError, match="did you mean 'small'") as caught:
        frame.lazy().llm.generate("{smal}", GREEDY)
    assert caught.value.parameter == "column_or_template"
    with pytest.raises(AttributeError, match="collect first"):
        frame.lazy().llm.topk("q", 1, query="x")
    with pytest.raises(AttributeError, match="it has generate"):
        frame.llm.summon("q")
    assert {"generate", "agenerate"} <= set(dir(frame.llm))
    assert "embed" in dir(frame.lazy().llm)


def test_an_empty_polars_frame_has_the_same_columns(llm: LLM, frame: pl.DataFrame) -> None:
    for verb, arguments in (("generate", ("q", GREEDY)), ("embed", ("q",)), ("dedup", ("q",))):
        empty = getattr(frame.clear().llm, verb)(*arguments)
        assert empty.schema == getattr(frame.llm, verb)(*arguments).schema
        assert len(empty) == 0


def test_what_an_interrupt_leaves_is_a_polars_frame(llm: LLM, interrupting_bar: Any) -> None:
    frame = pl.DataFrame({"q": [FRANCE, "Once upon a time"]})
    slow = SamplingParams(temperature=1.0, seed=1, max_tokens=900, ignore_eos=True)
    with pytest.raises(Interrupted) as caught:
        frame.llm.generate("q", [GREEDY, slow], use_tqdm=interrupting_bar)
    partial = caught.value.partial
    assert isinstance(partial, pl.DataFrame)
    assert partial["llm"].is_null().to_list() == [False, True]


def test_an_arrow_table_is_mapped_and_keeps_its_types(llm: LLM) -> None:
    table = pa.table(
        {
            "q": pa.array([FRANCE, None], type=pa.large_string()),
            "small": pa.array([1, None], type=pa.int8()),
            "kind": pa.array(["x", "x"]).dictionary_encode(),
        }
    )
    result = nbllm.map_table(table, "generate", "q", GREEDY, out="a")
    assert result.select(table.column_names).equals(table)
    assert result.schema.field("a").type == pa.large_string()
    assert result["a"].to_pylist() == [answer(llm, FRANCE), None]
    batch = nbllm.map_table(table.to_batches()[0], "embed", "q", dimensions=8)
    assert batch.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    assert len(nbllm.map_table(table.slice(0, 0), "generate", "q")) == 0
    again = nbllm.map_table(batch, "topk", "embedding", 1, query=[0.5] * 8)
    assert again["q"].to_pylist() == [FRANCE]


@pytest.mark.parametrize(
    ("table", "verb", "parameter"),
    [(pd.DataFrame({"q": [FRANCE]}), "generate", "table"), (pa.table({}), "submit", "verb")],
)
def test_what_is_no_table_or_verb_is_refused(
    llm: LLM, table: Any, verb: str, parameter: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        nbllm.map_table(table, verb, "q")
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("first", ["polars", "nbllm"])
def test_the_namespace_is_there_whichever_is_imported_first(first: str) -> None:
    second = {"polars": "nbllm", "nbllm": "polars"}[first]
    code = (
        f"import {first}, {second}, polars, importlib.util, nbllm, sys\n"
        "assert type(polars.DataFrame().llm).__name__ == 'PolarsVerbs'\n"
        "assert type(polars.LazyFrame().llm).__name__ == 'LazyVerbs'\n"
        "assert not {'torch', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert importlib.util.find_spec('pandas').origin\n"  # who only looks changes nothing
        "import pandas\n"
        "assert type(pandas.DataFrame().llm).__name__ == 'DataFrameAccessor'\n"
        "assert not any('nbllm' in type(f).__module__ for f in sys.meta_path)\n"
        "assert 'nbllm' not in type(polars.__spec__.loader).__module__\n"
        "importlib.reload(nbllm)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
