"""df.llm.generate: templates, sampling by row, twins, more columns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import pyarrow.parquet as pq
import pytest

from nbllm import LLM, InvalidRequestError, SamplingParams
from nbllm.outputs import CompletionOutput, Logprob

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"a": [1, 2, 3], "b": [10, 20, 30]})


def num_prompt_tokens(llm: LLM) -> int:
    return int(llm.get_metrics()["prompt_tokens"])


def test_all_kinds_of_templates_give_the_same_prompts(llm: LLM, frame: pd.DataFrame) -> None:
    expected = frame.llm.generate("What is {a} + {b}?", GREEDY)["llm"].tolist()
    assert "11" in expected[0]
    text = "What is {{ a }} + {{ b }}?"
    kinds: list[tuple[Any, dict[str, str]]] = [
        (text, {"template_format": "jinja2"}),
        (jinja2.Template(text), {}),
        (lambda row: f"What is {row['a']} + {row['b']}?", {}),
        (lambda row: [{"role": "user", "content": f"What is {row['a']} + {row['b']}?"}], {}),
    ]
    for template, options in kinds:
        assert frame.llm.generate(template, GREEDY, **options)["llm"].tolist() == expected


def test_a_row_that_a_function_does_not_suit_fails_alone(llm: LLM, frame: pd.DataFrame) -> None:
    def template(row: dict[Any, Any]) -> str:
        return f"What is {row['a']} + {30 // (row['a'] - 2)}?"

    answered = frame.llm.generate(template, GREEDY)
    assert answered["llm"].isna().tolist() == [False, True, False]
    assert "division" in answered["llm_error"][1]


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ a", "no Jinja template"), ("{{ c }}", "no column 'c'"), ("{% for %}", "no Jinja")],
)
def test_a_wrong_jinja_template_is_named(frame: pd.DataFrame, template: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        frame.llm.generate(template, template_format="jinja2")
    assert caught.value.parameter == "column_or_template"


def test_a_template_reaches_no_attribute_of_a_value(llm: LLM, frame: pd.DataFrame) -> None:
    answered = frame.llm.generate("{{ a.__class__.__mro__ }}", GREEDY, template_format="jinja2")
    assert answered["llm_error"].str.contains("unsafe|undefined|suit").all()


def test_missing_values_may_be_filled(llm: LLM) -> None:
    frame = pd.DataFrame({"who": ["you", None], "q": ["What is 1 + 1?"] * 2})
    answered = frame.llm.generate("{who}{q}", GREEDY, na="fill")
    assert answered["llm"].notna().all()
    assert answered["llm"][1] == frame["q"].llm.generate(None, GREEDY)[1]


def test_each_row_may_be_sampled_in_its_own_way(llm: LLM, frame: pd.DataFrame) -> None:
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": pd.Series([2, None, 5])}
    answered = frame.llm.generate("Count from {a}.", params, include=["usage"])
    tokens = answered["llm_completion_tokens"].tolist()
    assert tokens[0] == 2 and tokens[2] == 5 and tokens[1] > 5


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        ({"temperatur": 1.0}, "sampling_params"),
        ({"top_p": 2.0}, "top_p"),
        ({"seed": pd.Series([1])}, "seed"),
    ],
)
def test_a_wrong_sampling_parameter_is_named(
    llm: LLM, frame: pd.DataFrame, params: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        frame.llm.generate("{a}", params)
    assert caught.value.parameter == parameter


def test_rows_that_are_alike_are_computed_once(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 2 + 2?", "What is 3 + 3?"] * 10})
    alone = frame.head(2)["q"].llm.generate(None, GREEDY).tolist()
    before = llm.get_metrics()["generation_tokens"]
    answered = frame.llm.generate("q", GREEDY)
    spent = llm.get_metrics()["generation_tokens"] - before
    assert answered["llm"].tolist() == alone * 10
    again = frame.llm.generate("q", GREEDY, dedupe=False)
    assert again.equals(answered)
    whole = llm.get_metrics()["generation_tokens"] - before - spent
    assert whole == 10 * spent


def test_rows_that_chance_decides_are_computed_each_unless_asked(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["Tell me a story."] * 6})
    params = SamplingParams(temperature=1.5, max_tokens=10)
    assert frame.llm.generate("q", params)["llm"].nunique() > 1
    seeded = SamplingParams(temperature=1.5, max_tokens=10, seed=3)
    assert frame.llm.generate("q", seeded)["llm"].nunique() == 1


def test_twins_of_a_row_that_fails_have_its_error(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["word " * 4000, "word " * 4000, "What is 1 + 1?"]})
    answered = frame.llm.generate("q", GREEDY)
    assert answered["llm_error"].isna().tolist() == [False, False, True]
    assert answered["llm_error"][0] == answered["llm_error"][1]


def test_confidence_is_that_of_the_tokens(llm: LLM, frame: pd.DataFrame) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2)
    include = ["conf", "ppl", "margin", "finish", "usage"]
    answered = frame.llm.generate("Add {a}, {b}.", params, chat=False, include=include)
    prompts = [f"Add {a}, {b}." for a, b in zip(frame["a"], frame["b"], strict=True)]
    for row, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        completion = output.outputs[0]
        mean = completion.cumulative_logprob / len(completion.token_ids)
        leads = [
            entry[token].logprob - max(e.logprob for t, e in entry.items() if t != token)
            for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        found = answered.iloc[row]
        assert found["llm_conf"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert found["llm_ppl"] == pytest.approx(math.exp(-mean), rel=1e-4)
        assert found["llm_margin"] == pytest.approx(min(leads), abs=1e-3)
        assert found["llm_finish"] == completion.finish_reason
        assert found["llm_prompt_tokens"] == len(output.prompt_token_ids)
        assert found["llm_completion_tokens"] == len(completion.token_ids)
    assert str(answered["llm_conf"].dtype) == "Float64"
    assert str(answered["llm_completion_tokens"].dtype) == "Int64"


def test_an_unknown_column_to_include_is_named(frame: pd.DataFrame) -> None:
    with pytest.raises(InvalidRequestError, match="finish, usage") as caught:
        frame.llm.generate("{a}", include=["cost"])
    assert caught.value.parameter == "include"


def logprobs_of(completion: CompletionOutput, num_top: int) -> list[dict[str, Any]]:
    """What the column has, from what `LLM.generate` has."""

    def item(token_id: int, entry: Logprob) -> dict[str, Any]:
        return {"token": entry.decoded_token, "token_id": token_id, "logprob": entry.logprob}

    assert completion.logprobs is not None
    tokens = []
    for entries, token_id in zip(completion.logprobs, completion.token_ids, strict=True):
        top = sorted(entries, key=lambda token: entries[token].rank or 0)[:num_top]
        chosen = item(token_id, entries[token_id])
        tokens.append({**chosen, "top": [item(token, entries[token]) for token in top]})
    return tokens


@pytest.mark.parametrize(("asked", "num_top"), [(None, 0), (0, 0), (2, 2)])
def test_log_probabilities_are_those_of_the_tokens(
    llm: LLM, frame: pd.DataFrame, asked: int | None, num_top: int
) -> None:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=6, n=2, logprobs=asked)
    options: dict[str, Any] = {"chat": False, "include": ["logprobs"]}
    frame.loc[3] = [None, 40]
    answered = frame.llm.generate("Add {a}, {b}.", params, **options)
    column = answered["llm_logprobs"]
    prompts = [f"Add {float(a)}, {b}." for a, b in zip(frame["a"][:3], frame["b"], strict=False)]
    outputs = llm.generate(prompts, params.clone(logprobs=num_top), use_tqdm=False)
    for cell, texts, output in zip(column, answered["llm"], outputs, strict=False):
        expected = [logprobs_of(completion, num_top) for completion in output.outputs]
        assert [completion.text for completion in output.outputs] == texts
        for tokens, same in zip(cell, expected, strict=True):
            assert [token["token_id"] for token in tokens] == [token["token_id"] for token in same]
            for token, other in zip(tokens, same, strict=True):
                assert token["token"] == other["token"]
                assert token["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
                assert [t["token_id"] for t in token["top"]] == [
                    t["token_id"] for t in other["top"]
                ]
    assert column[3] is None
    rows = frame.llm.generate("Add {a}, {b}.", params, explode=True, **options)
    assert rows["llm_logprobs"][:-1].tolist() == [tokens for cell in column[:-1] for tokens in cell]


def test_explode_leaves_the_tokens_of_a_single_text_together(llm: LLM, frame: pd.DataFrame) -> None:
    params = {"temperature": 1.0, "seed": 2, "max_tokens": 4, "n": pd.Series([1, 2, 1])}
    options: dict[str, Any] = {"include": ["logprobs", "usage"], "explode": True}
    mixed = frame.llm.generate("Say {a}.", params, **options)
    assert mixed.index.tolist() == [0, 1, 1, 2]
    single = frame.llm.generate("Say {a}.", {**params, "n": 1}, **options)
    for answered in (mixed, single):
        for text, tokens in zip(answered["llm"], answered["llm_logprobs"], strict=True):
            assert "".join(token["token"] for token in tokens).startswith(text)


def test_log_probabilities_survive_parquet_and_a_journal(
    llm: LLM, frame: pd.DataFrame, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"journal": tmp_path / "journal", "include": ["logprobs"]}
    bare = frame.llm.generate("Add {a}, {b}.", GREEDY, journal=options["journal"])
    answered = frame.llm.generate("Add {a}, {b}.", GREEDY, **options)
    assert answered["llm"].equals(bare["llm"]) and answered["llm_logprobs"].notna().all()
    before = llm.get_metrics()["generation_tokens"]
    again = frame.llm.generate("Add {a}, {b}.", GREEDY, **options)
    assert llm.get_metrics()["generation_tokens"] == before
    assert again["llm_logprobs"].tolist() == answered["llm_logprobs"].tolist()
    answered.to_parquet(tmp_path / "answered.parquet")
    read = pq.read_table(tmp_path / "answered.parquet")["llm_logprobs"].to_pylist()
    assert read == answered["llm_logprobs"].tolist()


def test_what_was_read_from_parquet_may_be_completed_and_exploded(
    llm: LLM, frame: pd.DataFrame, tmp_path: Path
) -> None:
    params = SamplingParams(temperature=1.0, n=2, max_tokens=3, seed=1, logprobs=1)
    options: dict[str, Any] = {"include": ["logprobs", "conf"]}
    frame.llm.generate("Say {a}.", params, **options).to_parquet(tmp_path / "answered.parquet")
    holes = pd.read_parquet(tmp_path / "answered.parquet")
    holes.at[1, "llm"] = None
    whole = holes.llm.generate("Say {a}.", params, overwrite=True, explode=True, **options)
    expected = frame.llm.generate("Say {a}.", params, explode=True, **options)
    assert whole["llm"].tolist() == expected["llm"].tolist()
    assert whole["llm_logprobs"].map(len).tolist() == expected["llm_logprobs"].map(len).tolist()


def test_cached_tokens_are_those_of_the_prompt_found_in_the_prefix_cache(
    llm: LLM, tmp_path: Path
) -> None:
    head = "Once upon a time there was one who said so, " * 20
    frame = pd.DataFrame({"q": [head + "and left.", head + "and stayed."]})
    options: dict[str, Any] = {"include": ["usage"], "journal": tmp_path / "journal"}
    llm.reset_prefix_cache()
    assert frame.head(1).llm.generate("q", GREEDY, include=["usage"])["llm_cached_tokens"][0] == 0
    before = llm.get_metrics()["prefix_cache_hits"]
    answered = frame.llm.generate("q", GREEDY, **options)
    cached = answered["llm_cached_tokens"]
    assert cached.sum() == llm.get_metrics()["prefix_cache_hits"] - before
    assert (cached > 100).all() and (cached < answered["llm_prompt_tokens"]).all()
    assert cached.dtype == "Int64"
    twins = pd.concat([frame, frame], ignore_index=True)
    found = twins.llm.generate("q", GREEDY, **options)
    assert found["llm_cached_tokens"].tolist() == cached.tolist() * 2  # what the answer has cost


def test_several_texts_may_be_rows(llm: LLM, frame: pd.DataFrame) -> None:
    params = SamplingParams(temperature=1.0, n=3, max_tokens=5, seed=1)
    answered = frame.llm.generate("Say {a}.", params, explode=True)
    assert answered.index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert answered["llm"].map(type).eq(str).all()


def test_what_is_included_of_several_texts_is_beside_each(llm: LLM, frame: pd.DataFrame) -> None:
    params = SamplingParams(temperature=1.0, n=3, max_tokens=5, seed=1)
    include = ["conf", "finish", "usage"]
    frame = pd.concat([frame, pd.DataFrame({"a": [None]})], ignore_index=True)
    lists = frame.llm.generate("Say {a}.", params, include=include)
    rows = frame.llm.generate("Say {a}.", params, include=include, explode=True)
    for name in ("llm", "llm_conf", "llm_finish"):
        flat = [item for cell in lists[name][:-1] for item in cell]
        assert rows[name].iloc[:-1].tolist() == flat
        assert rows[name].isna().tolist() == [False] * len(flat) + [True]
        assert rows[name].dtype == ("Float64" if name == "llm_conf" else "string")
    assert rows["llm_prompt_tokens"].dtype == "Int64"


def test_examples_are_shown_before_each_row(llm: LLM, frame: pd.DataFrame) -> None:
    examples = pd.DataFrame({"a": [5], "b": [6], "sum": ["11"]})
    shown = frame.llm.generate("{a} and {b}", GREEDY, examples=examples, out="sum")
    messages = [
        [
            {"role": "user", "content": "5 and 6"},
            {"role": "assistant", "content": "11"},
            {"role": "user", "content": f"{a} and {b}"},
        ]
        for a, b in zip(frame["a"], frame["b"], strict=True)
    ]
    written = pd.DataFrame({"m": messages}).llm.chat("m", GREEDY, out="sum")
    assert shown["sum"].tolist() == written["sum"].tolist()
    with pytest.raises(InvalidRequestError, match="no column 'sum'"):
        frame.llm.generate("{a}", examples=frame, out="sum")


def test_a_conversation_goes_on(llm: LLM) -> None:
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    frame = pd.DataFrame({"talk": [talk, None]})
    answered = frame.llm.chat("talk", GREEDY, out="next", reply="messages")
    assert answered["next"][1] is None
    assert answered["next"][0][:1] == talk and answered["next"][0][1]["role"] == "assistant"
    assert "Paris" in answered["next"][0][1]["content"]
    assert frame["talk"][0] == talk


def test_an_argument_that_does_not_exist_is_a_type_error(frame: pd.DataFrame) -> None:
    with pytest.raises(TypeError, match="'temperature'"):
        frame.llm.generate("{a}", temperature=0.0)


def test_a_retry_answers_the_rows_without_an_answer_and_leaves_the_others(
    llm: LLM, frame: pd.DataFrame
) -> None:
    options: dict[str, Any] = {"include": ["finish", "usage"]}
    whole = frame.llm.generate("What is {a} + {b}?", GREEDY, **options)
    holes = whole.copy()
    holes.loc[1, ["llm", "llm_finish"]] = pd.NA
    before = llm.get_metrics()["generation_tokens"]
    again = holes.llm.retry(
        column_or_template="What is {a} + {b}?", sampling_params=GREEDY, **options
    )
    spent = llm.get_metrics()["generation_tokens"] - before
    pd.testing.assert_frame_equal(again, whole)
    assert spent == whole["llm_completion_tokens"][1]
