"""df.groupby(...).llm.summarize: every text of a group reaches the model, in prompts that fit."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pandas as pd
import pytest

from nbllm import LLM, Interrupted, InvalidRequestError, SamplingParams
from nbllm.dataframe.group_rows import group_rows

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
        result["text"] = pd.Series(texts, index=result.index).replace("", None)
        expected = groups["text"].agg("".join)
        expected = expected.to_frame() if as_index else expected
        expected["text"] = expected["text"].replace("", None)
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
