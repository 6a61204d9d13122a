"""classify, score, filter: exact probabilities of labels, against transformers and brute force."""

from __future__ import annotations

import asyncio
import enum
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbllm
from nbllm import LLM, InvalidRequestError
from nbllm.dataframe.label_trie import LabelTrie
from nbllm.dataframe.label_verb import ScoreLabels, read_labels
from nbllm.dataframe.row_job import RowJob
from nbllm.progress import progress_bar

MOODS = ["positive", "negative", "neutral"]
REVIEWS = [
    "The food was wonderful and the staff friendly.",
    "The room was dirty and the staff rude.",
    "It was okay, nothing special.",
]
DEMO = Path(nbllm.__file__).parent / "demo"
Reference = Callable[[list[int], list[int]], float]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """(prompt ids, label ids) -> log p(label), by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()

    def logprob(prompt: list[int], label: list[int]) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(label)[:, None])
        return float(chosen.sum())

    return logprob


@pytest.fixture
def frame() -> pd.DataFrame:
    """Five rows, of which one is missing and one is too long; labels of the index occur twice."""
    texts = [*REVIEWS, None, "word " * 2000]
    return pd.DataFrame({"review": texts, "id": range(5)}, index=[7, 7, 1, 2, 3])


def chat_ids(llm: LLM, text: str) -> list[int]:
    return list(llm.encode_chat([{"role": "user", "content": text}])["prompt_token_ids"])


def raw_logprobs(verb: ScoreLabels, prompts: list[Any]) -> np.ndarray[Any, Any]:
    job = RowJob(verb, prompts)
    job.run(progress_bar(1, "", enabled=False))
    assert not job.errors
    return np.array([result.numbers for result in job.results if result is not None])


def softmax(logprobs: Any) -> Any:
    weights = np.exp(np.asarray(logprobs) - np.max(logprobs))
    return weights / weights.sum()


# -- the trie --------------------------------------------------------------------------------------

END = 9
LABEL = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@given(labels=st.lists(LABEL, min_size=2, max_size=12, unique=True), seed=st.integers(0, 999))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_trie_sums_what_brute_force_multiplies(
    labels: list[tuple[int, ...]], seed: int
) -> None:
    def probabilities(path: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A random language of tokens 0 to 9, in which each text has its own distribution."""
        weights = np.random.default_rng([seed, *path]).random(10)
        return weights / weights.sum()

    trie = LabelTrie(labels, END)
    begins = {a for a, b in itertools.permutations(labels, 2) if b[: len(a)] == a}
    assert trie.sequences == [(*label, END) if label in begins else label for label in labels]
    logprobs = [
        {child: math.log(probabilities(node.path)[child]) for child in node.children}
        for node in trie.nodes
    ]
    expected = [
        math.prod(probabilities(ids[:depth])[ids[depth]] for depth in range(len(ids)))
        for ids in trie.sequences
    ]
    assert np.exp(trie.sum(logprobs)) == pytest.approx(expected)
    # They exclude each other, so together they are no more than certain.
    assert sum(expected) <= 1 + 1e-9
    # No place is asked for twice, and none in vain.
    paths = [node.path for node in trie.nodes]
    assert set(paths) == {ids[:depth] for ids in trie.sequences for depth in range(len(ids))}
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    ("labels", "end", "message"),
    [
        ([[1], []], END, "no tokens"),
        ([[1, 2], [1, 2]], END, "same tokens"),
        ([[1, END], [2]], END, "holds the end-of-text"),
        ([[1], [1, 2]], None, "has no end-of-text"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(
    labels: list[list[int]], end: int | None, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        LabelTrie(labels, end)
    assert caught.value.parameter == "labels"


# -- exactness -------------------------------------------------------------------------------------

LABEL_SETS = [
    MOODS,
    ["yes", "no", "no idea", "no idea at all", "yes, indeed"],  # some begin others
    ["Paris", "Paris, France", "Berlin", "unknown place"],
]


@pytest.mark.parametrize("labels", LABEL_SETS)
@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_are_those_of_transformers(
    llm: LLM, reference: Reference, labels: list[str], chat: bool
) -> None:
    verb = ScoreLabels(llm, labels, chat=chat, instruction="")
    encode = llm.get_tokenizer().encode
    prompts = [*REVIEWS, "What is the capital of France?"]
    scored = raw_logprobs(verb, list(prompts))
    for prompt, row in zip(prompts, scored, strict=True):
        ids = chat_ids(llm, prompt) if chat else encode(prompt)
        for label, sequence, number in zip(labels, verb.trie.sequences, row, strict=True):
            own = encode(label if chat else f" {label}", False)
            is_beginning = any(b != label and b.startswith(label) for b in labels)
            assert list(sequence) == [*own, 2] if is_beginning else own
            assert number == pytest.approx(reference(ids, list(sequence)), abs=1e-4)


@given(data=st.data())
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_labels_have_the_probabilities_of_brute_force(
    llm: LLM, reference: Reference, data: st.DataObject
) -> None:
    words = st.lists(st.sampled_from(["a", "ab", "b", " a", "é", "42"]), min_size=1, max_size=3)
    texts = words.map("".join).filter(lambda text: text.strip() == text)
    labels = data.draw(st.lists(texts, min_size=2, max_size=6, unique=True))
    frame = pd.DataFrame({"q": ["What is 40 + 2?"]})
    result = frame.llm.classify("q", labels, include="all", instruction="")
    ids = chat_ids(llm, "What is 40 + 2?")
    sequences = ScoreLabels(llm, labels).trie.sequences
    expected = softmax([reference(ids, list(sequence)) for sequence in sequences])
    found = [result[f"label_p[{label}]"][0] for label in labels]
    assert found == pytest.approx(expected, abs=1e-4)


def test_more_labels_than_one_request_reports_are_scored_alike(
    llm: LLM, reference: Reference
) -> None:
    tokenizer = llm.get_tokenizer()
    texts = (tokenizer.token_text(token_id) for token_id in range(300, 900))
    labels = [text for text in texts if text.isalpha() and len(tokenizer.encode(text, False)) == 1]
    labels = list(dict.fromkeys(labels))[:150]
    assert len(labels) == 150
    result = pd.DataFrame({"q": REVIEWS}).llm.classify("q", labels, include="all", instruction="")
    assert result.filter(like="label_p[").sum(axis=1).tolist() == pytest.approx([1.0] * 3)
    ids = chat_ids(llm, REVIEWS[0])
    expected = softmax([reference(ids, tokenizer.encode(label, False)) for label in labels])
    found = [result[f"label_p[{label}]"][0] for label in labels]
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_prompt_is_computed_once_for_all_labels(llm: LLM) -> None:
    text = " ".join(["It was nice."] * 60)
    labels = [f"{a} {b}" for a in ("red", "green", "blue", "grey") for b in ("cat", "dog")]
    verb = ScoreLabels(llm, labels, instruction="")
    assert len(verb.trie.nodes) > 5
    llm.reset_prefix_cache()
    before = llm.get_metrics()
    raw_logprobs(verb, [text])
    after = llm.get_metrics()
    computed = "prompt_tokens_by_source_local_compute"
    num_computed = after[computed] - before[computed]
    num_prompt = len(chat_ids(llm, text))
    block = llm.config.block_size + max(len(node.path) for node in verb.trie.nodes)
    assert num_prompt > 200
    assert num_computed <= num_prompt + len(verb.trie.nodes) * block


# -- classify --------------------------------------------------------------------------------------


def test_rows_get_a_label_with_its_probability_and_margin(llm: LLM, frame: pd.DataFrame) -> None:
    before = frame.copy()
    frame.attrs["source"] = "survey"
    result = frame.llm.classify("review", MOODS, out="mood", include=("p", "margin", "mass", "all"))
    added = ["mood", "mood_p", "mood_margin", "mood_mass"]
    added += [f"mood_p[{label}]" for label in MOODS] + ["mood_error"]
    assert list(result.columns) == ["review", "id", *added]
    assert result["mood"].tolist()[:3] == MOODS
    assert list(result["mood"].cat.categories) == MOODS
    p = result[[f"mood_p[{label}]" for label in MOODS]].iloc[:3].to_numpy(dtype=float)
    assert p.sum(axis=1) == pytest.approx([1, 1, 1])
    best, second = np.sort(p)[:, -1], np.sort(p)[:, -2]
    assert result["mood_p"].iloc[:3].tolist() == pytest.approx(best)
    assert result["mood_margin"].iloc[:3].tolist() == pytest.approx(best - second)
    assert ((result["mood_mass"].iloc[:3] > 0.9) & (result["mood_mass"].iloc[:3] <= 1)).all()
    assert {str(result[name].dtype) for name in added[1:-1]} == {"Float64"}
    assert result[added[:-1]].iloc[3:].isna().all(axis=None)
    assert result["mood_error"].isna().tolist() == [True, True, True, True, False]
    assert "1024" in result["mood_error"].iloc[4]
    assert result.index.equals(frame.index) and result.attrs["source"] == "survey"
    pd.testing.assert_frame_equal(frame, before)


def test_labels_come_from_enums_literals_and_dicts(frame: pd.DataFrame) -> None:
    class Mood(enum.Enum):
        GOOD = "positive"
        BAD = "negative"

    rows = frame.iloc[:2]
    expected = rows.llm.classify("review", ["positive", "negative"])
    pd.testing.assert_frame_equal(rows.llm.classify("review", Mood), expected)
    literal = Literal["positive", "negative"]
    pd.testing.assert_frame_equal(rows.llm.classify("review", literal), expected)
    numbers = rows.llm.classify("review", {1: "positive", -1: "negative"})
    assert numbers["label"].tolist() == [1, -1]
    assert numbers["label_p"].tolist() == pytest.approx(expected["label_p"].tolist())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("positive", "must be a list"),
        (5, "must be a list"),
        (["a"], "at least two"),
        (["a", "a"], "occurs twice"),
        (["a", None], "texts or numbers"),
        (["a", " "], "must not be blank"),
        ({"a": "x", "b": 3}, "must not be blank"),
        ({"a": "x", "b": "x"}, "same tokens"),
    ],
)
def test_wrong_labels_are_named(frame: pd.DataFrame, labels: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        frame.llm.classify("review", labels)
    assert caught.value.parameter == "labels"


def test_an_instruction_stands_before_the_text(llm: LLM, reference: Reference) -> None:
    frame = pd.DataFrame({"review": REVIEWS[:1]})
    asked = frame.llm.classify("review", MOODS, include="all", instruction="Which mood is it?")
    ids = chat_ids(llm, f"Which mood is it?\n\n{REVIEWS[0]}")
    encode = llm.get_tokenizer().encode
    expected = softmax([reference(ids, encode(label, False)) for label in MOODS])
    assert [asked[f"label_p[{m}]"][0] for m in MOODS] == pytest.approx(expected, abs=1e-4)
    default = frame.llm.classify("review", MOODS, include="all")
    named = "Answer with the one of these that fits best: positive, negative, neutral."
    same = frame.llm.classify("review", MOODS, include="all", instruction=named)
    pd.testing.assert_frame_equal(default, same)


def test_examples_are_shown_with_their_labels(llm: LLM, reference: Reference) -> None:
    examples = pd.DataFrame({"review": ["Lovely!", "Horrible."], "label": [1, 0]})
    labels = {1: "positive", 0: "negative"}
    frame = pd.DataFrame({"review": ["Not my taste."]})
    result = frame.llm.classify(
        "review", labels, include="all", examples=examples, chat=False, instruction=""
    )
    encode = llm.get_tokenizer().encode
    ids = encode("Lovely!positive\n\nHorrible.negative\n\nNot my taste.")
    expected = softmax([reference(ids, encode(text, False)) for text in labels.values()])
    assert [result[f"label_p[{n}]"][0] for n in labels] == pytest.approx(expected, abs=1e-4)
    strange = examples.assign(label=[1, 7])
    with pytest.raises(InvalidRequestError, match="'7' is not one") as caught:
        frame.llm.classify("review", labels, examples=strange)
    assert caught.value.parameter == "examples"


def test_calibration_divides_by_what_an_empty_input_gets(frame: pd.DataFrame) -> None:
    template, empty = "Review {id}: {review}", pd.DataFrame({"review": ["N/A"], "id": ["N/A"]})
    columns = [f"label_p[{mood}]" for mood in MOODS]
    plain = frame.llm.classify(template, MOODS, include="all")[columns].iloc[:3]
    bias = empty.llm.classify(template, MOODS, include="all")[columns].iloc[0].to_numpy(float)
    found = frame.llm.classify(template, MOODS, include="all", calibrate=True)[columns].iloc[:3]
    expected = plain.to_numpy(float) / bias
    expected /= expected.sum(axis=1, keepdims=True)
    assert found.to_numpy(float) == pytest.approx(expected, rel=1e-4, abs=1e-12)
    with pytest.raises(InvalidRequestError, match="content-free") as caught:
        frame.llm.classify("{id:.1f}", MOODS, calibrate=True)
    assert caught.value.parameter == "calibrate"


def test_finished_rows_are_found_in_the_journal_and_by_resume(
    llm: LLM, frame: pd.DataFrame
) -> None:
    first = frame.llm.classify("review", MOODS, out="mood", calibrate=True, journal="moods")
    scored = frame.llm.score("review", {"positive": 1, "negative": 0}, journal="scores")
    before = llm.get_metrics()["generation_tokens"]
    again = nbllm.resume("moods")
    # Only the content-free input is scored anew; the row that is too long never runs.
    assert llm.get_metrics()["generation_tokens"] == before + 1
    pd.testing.assert_frame_equal(again, first, check_dtype=False)
    pd.testing.assert_frame_equal(nbllm.resume("scores"), scored, check_dtype=False)
    assert llm.get_metrics()["generation_tokens"] == before + 1
    with pytest.warns(UserWarning, match="2 rows"):
        kept = frame.llm.filter("Is it good? {review}", 0.0, keep_scores=True, journal="kept")
    with pytest.warns(UserWarning, match="2 rows"):
        pd.testing.assert_frame_equal(nbllm.resume("kept"), kept, check_dtype=False)


def test_rows_that_are_alike_are_scored_once(llm: LLM) -> None:
    frame = pd.DataFrame({"review": REVIEWS[:1] * 20})
    before = llm.get_metrics()["generation_tokens"]
    result = frame.llm.classify("review", MOODS)
    assert llm.get_metrics()["generation_tokens"] == before + 1
    assert result["label"].tolist() == ["positive"] * 20
    assert nbllm.reproduce(result, "label", rows=2)["same"].all()


def test_overwrite_scores_only_rows_without_a_label(llm: LLM, frame: pd.DataFrame) -> None:
    done = frame.llm.classify("review", MOODS)
    with pytest.raises(InvalidRequestError, match="overwrite=True"):
        done.llm.classify("review", MOODS)
    done.iloc[0, done.columns.get_loc("label")] = "neutral"  # as a person has corrected it
    done.iloc[4, 0] = "The staff was rude."
    before = llm.get_metrics()["generation_tokens"]
    again = done.llm.classify("review", MOODS, overwrite=True)
    assert llm.get_metrics()["generation_tokens"] == before + 1
    assert again["label"].astype(object).tolist()[:3] == ["neutral", "negative", "neutral"]
    assert pd.isna(again["label"].iloc[3]) and again["label"].iloc[4] == "negative"
    assert again["label_error"].isna().all()
    assert list(again.columns) == list(done.columns) and again.dtypes.equals(done.dtypes)
    with pytest.raises(InvalidRequestError, match="'neutral'") as caught:
        done.llm.classify("review", ["positive", "negative"], overwrite=True)
    assert caught.value.parameter == "overwrite"
    assert llm.get_metrics()["generation_tokens"] == before + 1


@given(data=st.data())
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_scores_stand_at_their_rows_whatever_the_frame(llm: LLM, data: st.DataObject) -> None:
    cells = st.sampled_from([*REVIEWS, None, float("nan"), 3, "👍", "\ud800", ""])
    values = data.draw(st.lists(cells, max_size=6))
    index = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    frame = pd.DataFrame({"t": pd.Series(values, dtype=object), "x": 1, "y": 2})
    frame.index = pd.Index(index, name="key", dtype="int64")
    frame.columns = ["t", "same", "same"]
    result = frame.llm.classify("t", MOODS)
    assert result.index.equals(frame.index) and result.index.name == "key"
    pd.testing.assert_frame_equal(result[["t", "same"]].iloc[:, :3], frame)
    for place, value in enumerate(values):
        row = result.iloc[place]
        is_missing = value is None or value != value
        assert pd.isna(row["label"]) == (is_missing or value == "\ud800")
        assert pd.isna(row["label_error"]) == (value != "\ud800")
        if not pd.isna(row["label"]):
            alone = frame.iloc[[place]].llm.classify("t", MOODS)
            assert row["label_p"] == pytest.approx(alone["label_p"].iloc[0], abs=1e-5)


def test_empty_frames_and_frames_without_a_value_have_all_columns(llm: LLM) -> None:
    for values in ([], [None, float("nan")]):
        frame = pd.DataFrame({"t": pd.Series(values, dtype=object)})
        result = frame.llm.classify("t", MOODS, include="all")
        assert result["label"].dtype == pd.CategoricalDtype(MOODS)
        assert list(result.columns[2:5]) == [f"label_p[{mood}]" for mood in MOODS]
        assert result.iloc[:, 1:].isna().all(axis=None) and len(result) == len(values)
        assert str(frame.llm.score("t")["score"].dtype) == "Float64"
    assert list(frame.iloc[:0].llm.filter("t", keep_scores=True).columns) == ["t", "filter_p"]
    assert len(frame.iloc[:0].llm.classify("t", MOODS).llm.coverage("label")) == 0


def test_a_series_gives_a_frame_of_labels_and_a_series_of_scores(frame: pd.DataFrame) -> None:
    series = frame["review"]
    with pytest.warns(UserWarning, match="1 of 4 rows failed"):
        labels = series.llm.classify(MOODS, template="Is this good? {}")
    assert list(labels.columns) == ["label", "label_p", "label_margin"]
    asked = frame.llm.classify("Is this good? {review}", MOODS, errors="column")
    pd.testing.assert_frame_equal(labels, asked[labels.columns])
    with pytest.warns(UserWarning, match="1 of 4 rows failed"):
        scores = series.llm.score({"positive": 1, "negative": -1})
    assert scores.name == "score" and str(scores.dtype) == "Float64"
    assert scores.index.equals(series.index)
    assert scores.iloc[0] > 0.9 and scores.iloc[1] < -0.9 and scores.iloc[3:].isna().all()
    with pytest.raises(InvalidRequestError, match="include") as caught:
        series.llm.classify(MOODS, include="mas")
    assert caught.value.parameter == "include"


def test_the_twins_for_event_loops_give_the_same(frame: pd.DataFrame) -> None:
    rows = frame.iloc[:3]

    async def all_of_them() -> list[Any]:
        return [
            await rows.llm.aclassify("review", MOODS, calibrate=True),
            await rows.llm.ascore("review", {"positive": 1, "negative": 0}),
            await rows.llm.afilter("review", labels=("positive", "negative")),
            await rows["review"].llm.aclassify(MOODS),
            await rows["review"].llm.ascore({"positive": 1, "negative": 0}),
        ]

    found = asyncio.run(all_of_them())
    pd.testing.assert_frame_equal(found[0], rows.llm.classify("review", MOODS, calibrate=True))
    scores = rows.llm.score("review", {"positive": 1, "negative": 0})
    pd.testing.assert_frame_equal(found[1], scores)
    pd.testing.assert_frame_equal(
        found[2], rows.llm.filter("review", labels=("positive", "negative"))
    )
    pd.testing.assert_frame_equal(found[3], rows["review"].llm.classify(MOODS))
    pd.testing.assert_series_equal(found[4], scores["score"])


def test_labels_keep_their_order_and_texts() -> None:
    assert read_labels([3, "x"]) == {3: "3", "x": "x"}
    assert read_labels({"b": "two", "a": "one"}) == {"b": "two", "a": "one"}
