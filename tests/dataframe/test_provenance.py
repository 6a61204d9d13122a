"""What a call would do, is doing, and has done: lint, stream, reproduce."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nbllm
from nbllm import LLM, InvalidRequestError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture
def frame() -> pd.DataFrame:
    questions = [f"What is {a} + {b}?" for a in range(4) for b in range(3)]
    return pd.DataFrame({"q": questions}, index=[f"row {i}" for i in range(12)])


def test_lint_counts_what_the_call_would_meet(llm: LLM) -> None:
    texts = ["What is 1 + 1?", "What is 1 + 1?", None, " ", "word " * 4000, "word " * 1000]
    frame = pd.DataFrame({"q": texts})
    params = SamplingParams(temperature=0.0, max_tokens=100)
    before = llm.get_metrics()["generation_tokens"]
    report = frame.llm.lint("q", params, chat=False, probe=0)
    assert llm.get_metrics()["generation_tokens"] == before
    lengths = [len(llm.get_tokenizer().encode(text)) for text in frame["q"].dropna()]
    assert sorted(report.prompt_tokens.tolist()) == sorted(lengths)
    assert (report.num_rows, report.num_missing, report.num_empty) == (6, 1, 1)
    assert llm.config.max_model_len == 1024
    assert report.num_too_long == sum(length >= 1024 for length in lengths) == 1
    assert report.num_cut == sum(924 < length < 1024 for length in lengths)
    assert report.num_duplicates == 1
    shared = lengths[0] + min(lengths[3], lengths[4])
    assert shared - 2 <= report.shared_tokens <= shared + 2
    assert report.seconds is None
    assert report.samples == [" ", "What is 1 + 1?"]
    assert "1 with missing values" in repr(report)
    assert "<pre>" in report._repr_html_()


def test_lint_says_why_a_template_fails(llm: LLM) -> None:
    frame = pd.DataFrame({"x": [1.5, "two", "three"]})
    report = frame.llm.lint("{x:.2f}", probe=0)
    assert report.num_failed == 2
    assert any("suit" in text for text in report.errors)
    assert "2 whose prompt can't be made" in repr(report)


def test_lint_says_what_is_missing_and_what_the_template_leaves_out(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["a", None, "b c d"], "x": [None, None, 1], "id": 0, "z": 0})
    for template, options in (
        ("{q}: {x}", {}),
        ("{q}: {x}", {"na": "fill"}),
        ("{{ q }}: {{ x }}", {"template_format": "jinja2"}),
    ):
        report = frame.llm.lint(template, probe=0, **options)
        assert report.missing == {"q": 1, "x": 2}
        assert report.unused == ["id", "z"]
        assert "missing values: q 1, x 2\ncolumns that are not in the template: id, z" in repr(
            report
        )
    for source in ("q", lambda row: row["q"]):
        assert frame.llm.lint(source, probe=0).unused == []
    wide = frame.assign(**{f"column {i}": 0 for i in range(50)})
    assert "column 2 and 47 more" in repr(wide.llm.lint("{q}", probe=0))


def test_lint_shows_how_long_the_prompts_are(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["word " * length for length in [*range(1, 100), 400]]})
    report = frame.llm.lint("q", chat=False, probe=0)
    p50, p90, p99 = np.percentile(report.prompt_tokens, [50, 90, 99]).astype(int)
    assert f"p50 {p50}, p90 {p90}, p99 {p99}, max {report.prompt_tokens.max()}" in repr(report)
    (bars,) = [line for line in repr(report).splitlines() if "|" in line]
    assert bars.count("█") >= 1 and bars.endswith(f"▁| {report.prompt_tokens.max()}")
    assert "|" not in repr(frame.head(1).llm.lint("q", probe=0, samples=0))


def test_lint_of_an_empty_frame(llm: LLM) -> None:
    report = pd.DataFrame({"q": pd.Series(dtype=object)}).llm.lint("q")
    assert repr(report) == "0 rows, 0 to answer"


def test_a_probe_estimates_the_time(llm: LLM, frame: pd.DataFrame) -> None:
    report = frame.llm.lint("q", GREEDY, probe=4)
    assert report.seconds is not None and 0 < report.seconds < 600
    assert "estimated time" in repr(report)


def test_a_stream_gives_each_row_once(llm: LLM, frame: pd.DataFrame) -> None:
    pieces = list(frame.llm.stream("q", GREEDY, include=["usage"]))
    whole = frame.llm.generate("q", GREEDY, include=["usage"])
    pd.testing.assert_frame_equal(pd.concat(pieces).loc[frame.index], whole)
    assert all(piece["llm"].notna().all() for piece in pieces)


def test_a_stream_that_is_closed_stops_its_rows(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["Go on."] * 40})
    lengths = pd.Series([1] + [400] * 39)
    params = {"temperature": 1.0, "ignore_eos": True, "max_tokens": lengths}
    stream = frame.llm.stream("q", params)
    assert len(next(stream)) >= 1
    stream.close()
    while llm.get_metrics()["num_requests_running"]:
        pass
    with pytest.raises(StopIteration):
        next(stream)


def test_a_frame_says_how_its_columns_were_made(
    llm: LLM, frame: pd.DataFrame, tmp_path: Path
) -> None:
    answered = frame.llm.generate("q", GREEDY, out="sum", include=["finish"])
    assert frame.attrs == {}
    made = answered.attrs["nbllm"]
    assert list(made) == ["sum", "sum_error", "sum_finish"]
    assert made["sum"]["verb"] == "generate"
    assert made["sum"]["model"]["identity"] == llm.identity
    answered.to_parquet(tmp_path / "frame.parquet")
    read = pd.read_parquet(tmp_path / "frame.parquet")
    checked = nbllm.reproduce(read, rows=5)
    assert len(checked) == 5 and checked["same"].all()
    assert set(checked.index) <= set(frame.index)


def test_a_row_that_was_changed_is_found_out(llm: LLM, frame: pd.DataFrame) -> None:
    answered = frame.llm.generate("q", GREEDY)
    answered.loc["row 3", "llm"] = "something else"
    checked = nbllm.reproduce(answered, "llm", rows=12)
    assert checked.index[~checked["same"]].tolist() == ["row 3"]
    assert checked.loc["row 3", "before"] == "something else"


def test_seeded_samples_are_reproduced(llm: LLM, frame: pd.DataFrame) -> None:
    params = SamplingParams(temperature=1.2, seed=4, max_tokens=8)
    checked = nbllm.reproduce(frame.llm.generate("q", params), rows=6)
    assert checked["same"].all()


@pytest.mark.parametrize(
    ("column", "message"), [("q", "does not say"), ("llm", "without a seed"), (None, "can't be")]
)
def test_what_can_not_come_out_twice_is_said(
    llm: LLM, frame: pd.DataFrame, column: str | None, message: str
) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=4)
    sampled = frame.llm.generate("q", params)
    same = frame.llm.generate("q", {"temperature": 1.0, "max_tokens": 4})
    with pytest.raises(InvalidRequestError, match="without a seed"):
        nbllm.reproduce(same)
    made = sampled.llm.generate(lambda row: str(row["q"]), GREEDY, out="other")
    with pytest.raises(InvalidRequestError, match=message):
        nbllm.reproduce(made, column)


def test_identities_follow_the_weights(llm: LLM, tmp_path: Path) -> None:
    from nbllm.model_identity import model_identity

    weights = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.tobytes())
    kind = ("cpu", "float32", "auto")
    first = model_identity(tmp_path, *kind)
    assert model_identity(tmp_path, *kind) == first
    assert model_identity(tmp_path, "cuda", *kind[1:]) != first
    path.write_bytes((weights ^ 1).tobytes())
    assert model_identity(tmp_path, *kind) != first
    path.write_bytes(weights[:-1].tobytes())
    assert model_identity(tmp_path, *kind) != first
