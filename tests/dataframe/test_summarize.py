"""df.groupby(...).llm.summarize: every text of a group reaches the model, in prompts that fit."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nbllm import LLM, Interrupted, InvalidRequestError, SamplingParams
from nbllm.dataframe.citations import citation_table, claims
from nbllm.dataframe.group_rows import group_rows
from nbllm.dataframe.jobs import jobs, resume
from nbllm.dataframe.packing import Piece

GREEDY = SamplingParams(temperature=0.0)
ASK = "Is this positive or negative?"
SENTENCE = "The food was great and the waiter was very kind to all of us, number {}."


def summary(llm: LLM, texts: list[str], max_tokens: int = 128, instruction: str = ASK) -> str:
    prompt = llm.encode_chat([{"role": "user", "content": "\n\n".join([instruction, *texts])}])
    return llm.generate(prompt, GREEDY.clone(max_tokens=max_tokens))[0].outputs[0].text


@pytest.fixture
def prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the engine: encoded prompts."""
    seen: list[Any] = []
    call = llm._call

    def spy(rows: Any) -> Any:
        return call(seen.append(row[0]) or row for row in rows)

    monkeypatch.setattr(llm, "_call", spy)
    return seen


def test_a_small_group_is_one_prompt(llm: LLM) -> None:
    frame = pd.DataFrame(
        {
            "place": ["b", "a", "b", None, "c"],
            "text": ["The soup was cold.", "I love it.", None, "x", None],
        },
        index=[1, 1, 2, 3, 4],
    )
    before = frame.copy()
    result = frame.groupby("place").llm.summarize(
        "text", instruction=ASK, sampling_params=GREEDY, out="verdict"
    )
    pd.testing.assert_frame_equal(frame, before)
    assert result.index.tolist() == ["a", "b", "c"] and result.index.name == "place"
    assert list(result.columns) == ["verdict", "verdict_error"]
    assert result["verdict"].tolist() == [
        summary(llm, ["I love it."]),
        summary(llm, ["The soup was cold."]),
        pd.NA,
    ]
    assert result["verdict_error"].isna().all()


def test_a_long_group_is_summarized_as_a_tree(llm: LLM, prompts: list[Any]) -> None:
    texts = [SENTENCE.format(number) for number in range(150)]
    frame = pd.DataFrame({"k": ["long"] * 150 + ["short"], "text": [*texts, "I hated it."]})
    result = frame.groupby("k").llm.summarize(
        "text", instruction=ASK, sampling_params=GREEDY, max_tokens=100, llm=llm
    )
    limit = llm.config.max_model_len - 100
    rendered = [prompt.text for prompt in prompts]
    assert all(len(prompt.token_ids) <= limit for prompt in prompts)
    first_round = [text for text in rendered if "number" in text]
    whole = "".join(first_round)
    assert [whole.count(text) for text in texts] == [1] * 150
    assert 2 < len(first_round) < 30  # well filled, that is
    assert sum("I hated it." in text for text in rendered) == 1
    # The levels above, by hand.
    level = sorted(
        ([text for text in texts if text in prompt] for prompt in first_round),
        key=lambda part: texts.index(part[0]),
    )
    answers = [summary(llm, part, 100) for part in level]
    assert result["summary"]["long"] == summary(llm, answers, 100)
    assert len(rendered) == len(first_round) + 2
    assert result["summary"]["short"] == summary(llm, ["I hated it."], 100)


def test_a_text_that_is_longer_than_the_context_is_divided_between_words(
    llm: LLM, prompts: list[Any]
) -> None:
    words = [f"word{number}" for number in range(1200)]
    frame = pd.DataFrame({"k": [0], "text": [" ".join(words)]})
    result = frame.groupby("k").llm.summarize("text", sampling_params=GREEDY, max_tokens=8, llm=llm)
    assert result["summary"].notna().all()
    assert all(len(prompt.token_ids) + 8 <= llm.config.max_model_len for prompt in prompts)
    shown = " ".join(prompt.text.replace("<|im_end|>", " ") for prompt in prompts)
    found = [word for word in shown.split() if word in set(words)]
    assert sorted(found) == sorted(words)


def test_one_endless_word_is_divided_too(llm: LLM, prompts: list[Any]) -> None:
    signs = [chr(0x4E00 + number) for number in range(1000)]
    frame = pd.DataFrame({"k": [0], "text": ["".join(signs)]})
    result = frame.groupby("k").llm.summarize("text", sampling_params=GREEDY, llm=llm)
    assert result["summary_error"].isna().all()
    shown = "".join(prompt.text for prompt in prompts)
    assert all(sign in shown for sign in signs)
    assert all(len(prompt.token_ids) + 128 <= llm.config.max_model_len for prompt in prompts)


@pytest.mark.parametrize("keys", [["k"], ["j"], ["k", "j"], "j"])
@pytest.mark.parametrize("as_index", [True, False])
def test_the_groups_are_those_of_pandas(keys: Any, as_index: bool) -> None:
    frame = pd.DataFrame(
        {
            "k": ["b", "a", None, "b", "a"],
            "j": pd.Categorical(["x", "y", "x", "x", None], categories=["z", "y", "x"]),
            "text": list("pqrst"),
        },
        index=[5, 5, 1, 0, 5],
    )
    for sort, dropna, observed in itertools.product((True, False), repeat=3):
        groups = frame.groupby(keys, sort=sort, dropna=dropna, observed=observed, as_index=as_index)
        result, rows = group_rows(groups, ["text"])
        texts = ["".join(frame["text"].iloc[list(part)]) for part in rows]
        result["text"] = pd.Series(texts, index=result.index, dtype="string").replace("", pd.NA)
        expected = groups["text"].agg("".join)
        expected = expected.to_frame() if as_index else expected
        expected["text"] = expected["text"].astype("string").replace("", pd.NA)
        pd.testing.assert_frame_equal(result, expected, check_dtype=False)


def test_keys_may_be_columns_of_the_result(llm: LLM) -> None:
    frame = pd.DataFrame({"size": [1, 2], "k": ["a", "a"], "text": ["I love it.", "I hate it."]})
    result = frame.groupby("k", as_index=False).llm.summarize("text", sampling_params=GREEDY)
    assert list(result.columns) == ["k", "summary", "summary_error"]
    with pytest.raises(InvalidRequestError) as caught:
        frame.groupby("k", as_index=False).llm.summarize("text", out="k")
    assert caught.value.parameter == "out"


def test_a_group_that_fails_costs_the_others_nothing(llm: LLM) -> None:
    frame = pd.DataFrame({"k": [1, 2, 2], "text": ["I love it.", ["no", "text"], "x"]})
    groups = frame.groupby("k")
    result = groups.llm.summarize("text", instruction=ASK, sampling_params=GREEDY)
    assert result["summary"].tolist() == [summary(llm, ["I love it."]), pd.NA]
    assert "only texts" in result["summary_error"][2]
    with pytest.warns(UserWarning, match="only texts"):
        assert list(groups.llm.summarize("text", errors="warn").columns) == ["summary"]
    with pytest.raises(InvalidRequestError, match="only texts"):
        groups.llm.summarize("text", errors="raise")


def test_an_interrupt_keeps_the_groups_that_are_done(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [SENTENCE.format(number) for number in range(100)]
    frame = pd.DataFrame({"k": ["long"] * 100 + ["short"], "text": [*texts, "I hated it."]})

    class Bar:
        """Ctrl-C comes when the second round begins."""

        def __init__(self, total: int, **_: Any) -> None:
            self._total = total

        @property
        def total(self) -> int:
            return self._total

        @total.setter
        def total(self, total: int) -> None:
            raise KeyboardInterrupt

        def update(self, count: int = 1) -> None: ...

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    groups = frame.groupby("k")
    with pytest.raises(Interrupted) as caught:
        groups.llm.summarize("text", sampling_params=GREEDY, max_tokens=20, use_tqdm=Bar)
    partial = caught.value.partial
    assert partial["summary"].notna()["short"]
    assert partial["summary_error"]["long"] == "interrupted"
    returned = groups.llm.summarize(
        "text", sampling_params=GREEDY, max_tokens=20, use_tqdm=Bar, on_interrupt="return"
    )
    pd.testing.assert_frame_equal(returned, partial)


def test_the_asynchronous_twin_gives_the_same(llm: LLM) -> None:
    frame = pd.DataFrame({"k": [1, 2, 1], "text": ["I love it.", "I hate it.", "So good."]})
    groups = frame.groupby("k")
    result = asyncio.run(groups.llm.asummarize("text", sampling_params=GREEDY))
    pd.testing.assert_frame_equal(result, groups.llm.summarize("text", sampling_params=GREEDY))


def test_an_empty_frame_has_no_groups(llm: LLM) -> None:
    frame = pd.DataFrame({"k": pd.Series([], dtype=int), "text": pd.Series([], dtype=object)})
    result = frame.groupby("k").llm.summarize("text")
    assert list(result.columns) == ["summary", "summary_error"] and len(result) == 0


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 600}, "max_tokens"),
        ({"instruction": "word " * 3000}, "max_tokens"),
        ({"sampling_params": [GREEDY, GREEDY]}, "sampling_params"),
        ({"na": "raise"}, "na"),
        ({"chat": "maybe"}, "chat"),
    ],
)
def test_a_wrong_argument_is_named(llm: LLM, options: dict[str, Any], parameter: str) -> None:
    frame = pd.DataFrame({"k": [1, 2], "text": ["a", None]})
    with pytest.raises(InvalidRequestError) as caught:
        frame.groupby("k").llm.summarize("text", **options)
    assert caught.value.parameter == parameter
    with pytest.raises(InvalidRequestError, match="no column 'texts'"):
        frame.groupby("k").llm.summarize("{texts}")


def cited_frame(index: Any) -> pd.DataFrame:
    texts = ["The soup was cold.", "I love it.", "So kind a waiter.", None, "Too dear.", "Good."]
    return pd.DataFrame({"k": ["b", "a", "b", "a", "a", "b"], "text": texts}, index=index)


@pytest.mark.parametrize(
    "index",
    [
        None,
        list("uvwxyz"),
        [1, 1, 2, 2, 1, 3],
        pd.MultiIndex.from_tuples([(n % 2, f"i{n}") for n in range(6)]),
    ],
)
def test_every_cited_row_is_of_the_group(llm: LLM, index: Any) -> None:
    frame = cited_frame(index)
    result = frame.groupby("k").llm.summarize("text", cite=True, sampling_params=GREEDY)
    assert list(result.columns) == ["summary", "summary_citations", "summary_error"]
    assert result["summary_error"].isna().all()
    for key, cited in result["summary_citations"].items():
        own = frame[(frame["k"] == key) & frame["text"].notna()].index.tolist()
        assert cited and all(claim["rows"] for claim in cited)
        assert all(row in own for claim in cited for row in claim["rows"])
        assert result["summary"][key] == " ".join(claim["claim"] for claim in cited)


def test_claims_and_numbers_are_what_the_model_says(llm: LLM, monkeypatch: Any) -> None:
    seen: list[tuple[Any, Any]] = []
    call = llm._call
    monkeypatch.setattr(
        llm, "_call", lambda rows: call(seen.append(row[:2]) or row for row in rows)
    )
    frame = cited_frame(list("uvwxyz"))
    result = frame.groupby("k").llm.summarize("text", cite=True, sampling_params=GREEDY, llm=llm)
    monkeypatch.undo()
    assert len(seen) == 2
    for prompt, params in seen:
        key, shown = ("b", "uwz") if "soup" in prompt.text else ("a", "vy")
        texts = [f"[{n}] {frame['text'][row]}" for n, row in enumerate(shown, 1)]
        assert "\n\n".join(texts) in prompt.text
        again = llm.generate({"prompt_token_ids": prompt.token_ids}, params)
        said = json.loads(again[0].outputs[0].text)["claims"]
        assert result["summary_citations"][key] == [
            {
                "claim": claim["claim"],
                "rows": list(dict.fromkeys(shown[number - 1] for number in claim["rows"])),
            }
            for claim in said
        ]


def test_a_claim_about_claims_stands_on_the_rows_of_these() -> None:
    pack = [Piece("p", (3, 5)), Piece("q", (7,)), Piece("r", (5, 8))]
    answer = '{"claims":[{"claim":"x","rows":[3,1,3]},{"claim":"y","rows":[2]}]}'
    assert claims(answer, pack) == [Piece("x", (5, 8, 3)), Piece("y", (7,))]


def test_citations_of_several_rounds_are_rows_of_the_group(llm: LLM, prompts: list[Any]) -> None:
    texts = [SENTENCE.format(number) for number in range(90)]
    frame = pd.DataFrame({"k": ["long"] * 90 + ["short"], "text": [*texts, "I hated it."]})
    groups = frame.groupby("k")
    result = groups.llm.summarize("text", cite=True, sampling_params=GREEDY, llm=llm)
    assert result["summary_error"].isna().all() and len(prompts) > 4
    assert all(len(prompt.token_ids) + 256 <= llm.config.max_model_len for prompt in prompts)
    first = [prompt.text for prompt in prompts if "waiter" in prompt.text]
    assert sum("[1] The food" in text for text in first) == len(first)
    cited = {row for claim in result["summary_citations"]["long"] for row in claim["rows"]}
    assert cited and cited <= set(range(90))
    assert {row for c in result["summary_citations"]["short"] for row in c["rows"]} == {90}


def test_citations_are_a_table_that_merges_with_the_frame(llm: LLM) -> None:
    frame = cited_frame(list("uvwxyz"))
    frame.loc["t"] = ["c", None]
    groups = frame.groupby("k")
    result = groups.llm.summarize("text", cite=True, sampling_params=GREEDY)
    table = groups.llm.summarize("text", cite="table", sampling_params=GREEDY)
    assert list(table.columns) == ["k", "claim", "row", "summary_error"]
    pd.testing.assert_frame_equal(table, citation_table(result))
    exploded = result["summary_citations"].explode()
    claims_of = {key: [] if cited is None else cited for key, cited in exploded.groupby(level=0)}
    for key, part in table.groupby("k"):
        pairs = [(c["claim"], row) for c in claims_of[key] if c for row in c["rows"]]
        assert list(zip(part["claim"], part["row"], strict=True)) == pairs or key == "c"
    assert table[table["k"] == "c"][["claim", "row"]].isna().all(axis=None)
    merged = table.dropna(subset="row").merge(frame, left_on="row", right_index=True)
    assert (merged["k_x"] == merged["k_y"]).all() and merged["text"].notna().all()


def test_claims_that_are_cut_are_an_error_of_their_group(llm: LLM) -> None:
    frame = pd.DataFrame({"k": [1, 2, 2], "text": ["I love it.", ["no", "text"], "x"]})
    groups = frame.groupby("k")
    result = groups.llm.summarize("text", cite=True, sampling_params=GREEDY)
    assert result["summary"].notna().tolist() == [True, False]
    cut = groups.llm.summarize("text", cite=True, sampling_params=GREEDY, max_tokens=4)
    assert cut["summary"].isna().all() and cut["summary_citations"].isna().all()
    assert "cut by length" in cut["summary_error"][1] and "only texts" in cut["summary_error"][2]


@pytest.mark.parametrize("as_index", [True, False])
def test_groups_of_a_series_give_what_agg_gives(llm: LLM, as_index: bool) -> None:
    frame = cited_frame([1, 1, 2, 2, 1, 3])
    for sort, dropna in itertools.product((True, False), repeat=2):
        groups: Any = frame.groupby("k", as_index=as_index, sort=sort, dropna=dropna)["text"]
        result = groups.llm.summarize(sampling_params=GREEDY, max_tokens=4)
        expected = groups.agg("first")
        assert type(result) is type(expected)
        both = [result, expected]
        if as_index:
            assert result.name == "text"
            pd.testing.assert_index_equal(result.index, expected.index)
        else:
            assert [list(each.columns) for each in both] == [["k", "text"]] * 2
            assert result["k"].tolist() == expected["k"].tolist()
    whole = frame.groupby("k").llm.summarize("It: {text}", sampling_params=GREEDY, max_tokens=4)
    column: Any = frame.groupby("k")["text"]
    said = column.llm.summarize("It: {}", sampling_params=GREEDY, max_tokens=4, out="summary")
    pd.testing.assert_series_equal(said, whole["summary"])


def test_groups_of_a_series_warn_of_errors(llm: LLM) -> None:
    groups: Any = pd.Series([["no"], "Good."], name="text").groupby([1, 2])
    with pytest.warns(UserWarning, match="only texts"):
        said = groups.llm.summarize(sampling_params=GREEDY, max_tokens=4)
    assert said.isna().tolist() == [True, False]
    table_groups: Any = pd.Series(["Good."], name="text").groupby(["x"])
    table = table_groups.llm.summarize(cite="table", sampling_params=GREEDY)
    assert table["row"].eq(0).all() and list(table.columns) == ["index", "claim", "row"]
    for option in ({"errors": "column"}, {"cite": True}):
        with pytest.raises(InvalidRequestError) as caught:
            groups.llm.summarize(**option)
        assert caught.value.parameter in option


def test_a_journal_goes_on_by_name(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBLLM_HOME", str(tmp_path))
    frame = cited_frame(list("uvwxyz"))
    for cite in (False, True):
        groups = frame.groupby(["k"], as_index=False, sort=False)
        result = groups.llm.summarize("text", cite=cite, sampling_params=GREEDY, journal="it")
        before = int(llm.get_metrics()["generation_tokens"])
        pd.testing.assert_frame_equal(resume("it", llm=llm), result)
        assert int(llm.get_metrics()["generation_tokens"]) == before
    options: dict[str, Any] = {"sampling_params": GREEDY, "max_tokens": 4}
    frame.groupby(lambda row: row < "w").llm.summarize("text", journal="function", **options)
    frame.groupby("k")["text"].llm.summarize(journal="series", **options)
    listed = jobs().set_index("name")
    assert listed["verb"].eq("summarize").all() and listed["rows"].eq(2).all()
    assert listed["resumable"].to_dict() == {"it": True, "function": False, "series": False}
