"""Jobs: a journal makes a call resumable, whatever ended it; and calls that run beside the cell."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import nbllm
from nbllm import (
    LLM,
    Interrupted,
    InvalidRequestError,
    JournalError,
    SamplingParams,
    set_default_llm,
)
from nbllm.dataframe.frame_job import FrameJob

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture
def frame() -> pd.DataFrame:
    questions = [f"What is {a} + {b}?" for a in range(4) for b in range(3)]
    return pd.DataFrame({"q": questions}, index=[f"row {i}" for i in range(12)])


def num_generated(llm: LLM) -> int:
    return int(llm.get_metrics()["generation_tokens"])


def test_rows_in_the_journal_cost_no_token(llm: LLM, frame: pd.DataFrame) -> None:
    first = frame.llm.generate("q", GREEDY, journal="sums")
    before = num_generated(llm)
    again = frame.sample(frac=1, random_state=0).llm.generate("{q}", GREEDY, journal="sums")
    assert num_generated(llm) == before
    pd.testing.assert_frame_equal(again.loc[frame.index], first)


@pytest.mark.parametrize(
    "changes",
    [{"sampling_params": SamplingParams(temperature=0.0, max_tokens=5)}, {"system": "Be brief."}],
)
def test_what_would_come_out_differently_is_computed_again(
    llm: LLM, frame: pd.DataFrame, changes: dict[str, Any]
) -> None:
    frame.llm.generate("q", GREEDY, journal="sums")
    before = num_generated(llm)
    changed = frame.llm.generate("q", **({"sampling_params": GREEDY} | changes), journal="sums")
    assert num_generated(llm) > before
    expected = frame.llm.generate("q", **({"sampling_params": GREEDY} | changes))
    pd.testing.assert_frame_equal(changed, expected)


def test_sampled_rows_are_found_again_at_their_places(llm: LLM, frame: pd.DataFrame) -> None:
    same = pd.DataFrame({"q": ["Tell me a story."] * 4})
    params = SamplingParams(temperature=1.5, max_tokens=8)
    first = same.llm.generate("q", params, journal="stories")
    assert first["llm"].nunique() > 1
    pd.testing.assert_frame_equal(same.llm.generate("q", params, journal="stories"), first)


def test_a_row_that_failed_is_tried_again(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 1 + 1?", "word " * 4000]})
    first = frame.llm.generate("q", GREEDY, journal="bad")
    assert first["llm_error"].isna().tolist() == [True, False]
    assert nbllm.jobs()["done"].tolist() == [1]
    second = frame.llm.generate("q", GREEDY, journal="bad")
    pd.testing.assert_frame_equal(second, first)


KILLED = """
import os, signal, sys
import pandas as pd
from nbllm import LLM, SamplingParams

class Bar:
    def __init__(self, **_):
        self.done = 0
    def update(self, count):
        self.done += count
        folder = os.path.join(os.environ["NBLLM_HOME"], "jobs", "long")
        if self.done >= 20 and any(name.endswith(".parquet") and name.startswith("part") for name in
                                   os.listdir(folder)):
            os.kill(os.getpid(), signal.SIGKILL)
    def close(self):
        pass

llm = LLM(device="cpu", dtype="float32", max_num_seqs=4)
frame = pd.DataFrame({"q": [f"What is {a} + {b}?" for a in range(20) for b in range(20)]})
frame.llm.generate("q", SamplingParams(temperature=0, max_tokens=12), out="sum", journal="long",
                   use_tqdm=Bar)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_job_goes_on_where_it_was(llm: LLM) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (job,) = nbllm.jobs().to_dict("records")
    assert job["name"] == "long" and job["verb"] == "generate" and job["resumable"]
    assert 0 < job["done"] < job["rows"] == 400
    before = num_generated(llm)
    frame = nbllm.resume("long", llm=llm)
    spent = num_generated(llm) - before
    expected = frame[["q"]].llm.generate("q", GREEDY, out="sum")
    pd.testing.assert_frame_equal(frame, expected)
    whole = num_generated(llm) - before - spent
    assert spent < whole
    assert nbllm.jobs()["done"].tolist() == [400]


def test_an_interrupted_job_goes_on_where_it_was(llm: LLM, frame: pd.DataFrame) -> None:
    class Interrupting:
        def __init__(self, **_: Any) -> None:
            self.done = 0

        def update(self, count: int) -> None:
            self.done += count
            if self.done >= 3:
                raise KeyboardInterrupt

        def close(self) -> None:
            pass

    with pytest.raises(Interrupted):
        frame.llm.generate("q", GREEDY, journal="cut", use_tqdm=Interrupting)
    assert 3 <= nbllm.jobs()["done"].item() <= 12
    pd.testing.assert_frame_equal(nbllm.resume("cut"), frame.llm.generate("q", GREEDY))


def test_resuming_loads_the_jobs_model_if_another_is_open(
    llm: LLM, frame: pd.DataFrame, home: Path
) -> None:
    set_default_llm(None)
    with LLM(device="cpu", dtype="float32", max_model_len=256) as first:
        expected = frame.llm.generate("q", GREEDY, journal="old", llm=first)
    for part in (home / "jobs" / "old").glob("part-*"):
        part.unlink()
    with LLM(device="cpu", dtype="bfloat16") as other:
        found = nbllm.resume("old")
        assert num_generated(other) == 0
    set_default_llm(llm)
    pd.testing.assert_frame_equal(found, expected)


def test_a_job_with_a_function_is_resumed_by_its_cell(llm: LLM, frame: pd.DataFrame) -> None:
    def ask(row: dict[Any, Any]) -> str:
        return str(row["q"])

    first = frame.llm.generate(ask, GREEDY, journal="function")
    assert nbllm.jobs()["resumable"].tolist() == [False]
    with pytest.raises(JournalError, match="run its cell again"):
        nbllm.resume("function")
    before = num_generated(llm)
    pd.testing.assert_frame_equal(frame.llm.generate(ask, GREEDY, journal="function"), first)
    assert num_generated(llm) == before


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("generate", {"template": "{} Say it.", "sampling_params": GREEDY, "out": "a"}),
        ("classify", {"labels": ["yes", "no"]}),
        ("score", {}),
        ("extract", {"schema": {"ok": bool}}),
        ("embed", {"pooling": "last"}),
    ],
)
@pytest.mark.parametrize("name", ["q", None, 7])
def test_a_job_of_a_series_is_resumed(
    llm: LLM, frame: pd.DataFrame, verb: str, arguments: dict[str, Any], name: Any
) -> None:
    series = frame["q"].head(3).rename(name)
    first = getattr(series.llm, verb)(**arguments, journal="series")
    (listed,) = nbllm.jobs().itertuples()
    assert (listed.verb, listed.rows, listed.done) == (verb, 3, 3) and listed.resumable
    computed = llm.get_metrics()["prompt_tokens"]
    again = nbllm.resume("series")
    assert llm.get_metrics()["prompt_tokens"] == computed
    assert type(again) is type(first) and again.equals(first)
    assert again.index.equals(series.index) and getattr(again, "name", None) == getattr(
        first, "name", None
    )


@pytest.mark.parametrize("name", [("a", "b"), 2.5])
def test_a_series_whose_name_is_no_text_is_resumed_by_its_cell(
    llm: LLM, frame: pd.DataFrame, name: Any
) -> None:
    frame["q"].rename(name).llm.generate(None, GREEDY, journal="series")
    assert nbllm.jobs()["resumable"].tolist() == [False]


def test_a_job_of_several_passes_is_listed_and_resumed(llm: LLM, frame: pd.DataFrame) -> None:
    vectors: dict[str, Any] = {"pooling": "mean"}
    kept = frame.llm.dedup("q", 0.99, journal="dedup", **vectors)
    best = frame.llm.topk("q", 2, query="What is 0 + 1?", journal="topk", **vectors)
    joined = frame.llm.sim_join(frame, "q", journal="sim_join", **vectors)
    computed = llm.get_metrics()["prompt_tokens"]
    pd.testing.assert_frame_equal(nbllm.resume("dedup"), kept)
    pd.testing.assert_frame_equal(nbllm.resume("topk"), best)
    again = frame.llm.sim_join(frame, "q", journal="sim_join", **vectors)
    pd.testing.assert_frame_equal(again, joined)
    assert llm.get_metrics()["prompt_tokens"] == computed
    resumable = nbllm.jobs().set_index("verb")["resumable"]
    assert resumable.to_dict() == {"dedup": True, "topk": True, "sim_join": False}


def test_a_journal_may_be_any_folder(llm: LLM, frame: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "somewhere" / "else"
    first = frame.llm.generate("q", GREEDY, journal=folder)
    assert nbllm.jobs().empty
    pd.testing.assert_frame_equal(nbllm.resume(folder), first)


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_a_job_is_listed_while_a_file_of_it_vanishes(
    llm: LLM, frame: pd.DataFrame, home: Path
) -> None:
    frame.llm.generate("q", GREEDY, journal="busy", llm=llm)
    (home / "jobs" / "busy" / "part-00000009.parquet.tmp").symlink_to("it was renamed")
    assert nbllm.jobs()["name"].tolist() == ["busy"]


@pytest.mark.parametrize("name", ["", "../up\0", 7, "-" * 200])
def test_a_name_that_is_none_is_refused(llm: LLM, frame: pd.DataFrame, name: Any) -> None:
    with pytest.raises(JournalError):
        frame.llm.generate("q", GREEDY, journal=name)


def test_there_is_no_job_of_that_name(home: Path) -> None:
    with pytest.raises(JournalError, match=r"nbllm\.jobs"):
        nbllm.resume("nothing")
    assert list(nbllm.jobs().columns) == [
        "name",
        "verb",
        "model",
        "rows",
        "done",
        "changed",
        "resumable",
    ]


def test_a_submitted_call_gives_the_same_frame(llm: LLM, frame: pd.DataFrame) -> None:
    job = frame.llm.submit("q", GREEDY, journal="beside")
    result = job.result(timeout=60)
    pd.testing.assert_frame_equal(result, frame.llm.generate("q", GREEDY))
    assert job.done() and job.num_done == job.num_rows == 12
    assert repr(job) == "FrameJob(done, 12 of 12 rows)"
    pd.testing.assert_frame_equal(job.frame, result)


def test_a_cancelled_job_keeps_what_had_ended(llm: LLM) -> None:
    frame = pd.DataFrame({"q": [f"Count to {i}." for i in range(300)]})
    first_rows = pd.Series([1] * 20 + [200] * 280)
    params = {"temperature": 0.0, "max_tokens": first_rows, "ignore_eos": True}
    job = frame.llm.submit("q", params, order="given")
    while job.num_done < 5:
        assert not job.done(), job.result()
    job.cancel()
    with pytest.raises(Interrupted) as caught:
        job.result(timeout=60)
    partial = caught.value.partial
    assert 5 <= partial["llm"].notna().sum() < 300
    missing = partial["llm"].isna()
    assert (partial.loc[missing, "llm_error"] == "interrupted").all()
    assert llm.get_metrics()["num_requests_running"] == 0
    job.cancel()


def test_calls_can_be_awaited_side_by_side(llm: LLM, frame: pd.DataFrame) -> None:
    async def both() -> list[Any]:
        calls = [
            frame.llm.agenerate("q", GREEDY),
            frame["q"].llm.agenerate(None, GREEDY),
        ]
        return await asyncio.gather(*calls)

    whole, series = asyncio.run(both())
    pd.testing.assert_frame_equal(whole, frame.llm.generate("q", GREEDY))
    assert series.tolist() == whole["llm"].tolist()


def test_cancelling_the_task_cancels_the_job(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["Go on."] * 50})
    params = SamplingParams(temperature=1.0, max_tokens=300, ignore_eos=True)

    async def run() -> None:
        task = asyncio.create_task(frame.llm.agenerate("q", params))
        while not llm.get_metrics()["num_requests_running"]:
            assert not task.done(), task.result()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    while llm.get_metrics()["num_requests_running"]:
        pass


def test_a_wrong_argument_of_a_submitted_call_is_raised_in_the_cell(
    llm: LLM, frame: pd.DataFrame
) -> None:
    with pytest.raises(InvalidRequestError, match="no column 'p'"):
        frame.llm.submit("{p}")


def test_a_submitted_call_warns_of_rows_that_failed(llm: LLM) -> None:
    series = pd.Series(["What is 1 + 1?", "word " * 4000])
    with pytest.warns(UserWarning, match="1 of 2 rows failed"):
        answers = series.llm.submit(None, GREEDY).result(timeout=60)
    assert answers.isna().tolist() == [False, True]


def test_a_submitted_call_that_fails_leaves_its_frame(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 1 + 1?", "word " * 4000]})
    nbllm.last = None
    job = frame.llm.submit("q", GREEDY, errors="raise", journal="failed")
    with pytest.raises(InvalidRequestError):
        job.result(timeout=60)
    assert nbllm.last["llm"].isna().tolist() == [False, True]
    frame.llm.submit("q", GREEDY, journal="failed").result(timeout=60)


def test_a_bar_that_can_not_be_made_leaves_no_journal_open(llm: LLM, frame: pd.DataFrame) -> None:
    def no_bar(**_: Any) -> None:
        raise RuntimeError("no bar")

    with pytest.raises(RuntimeError, match="no bar"):
        frame.llm.submit("q", GREEDY, journal="barless", use_tqdm=no_bar)
    frame.llm.generate("q", GREEDY, journal="barless")


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("classify", {"labels": ["yes", "no"], "calibrate": True}),
        ("score", {"calibrate": True}),
        ("filter", {"calibrate": True, "keep_scores": True}),
        ("extract", {"schema": {"ok": bool}}),
        ("embed", {"pooling": "last"}),
    ],
)
def test_a_verb_runs_beside_the_cell(
    llm: LLM, frame: pd.DataFrame, verb: str, arguments: dict[str, Any]
) -> None:
    few = frame.head(3)
    expected = getattr(few.llm, verb)("q", **arguments)
    job = getattr(few.llm, verb)("q", **arguments, job=True)
    assert isinstance(job, FrameJob)
    pd.testing.assert_frame_equal(job.result(timeout=60), expected)
    if verb != "filter":
        alone = getattr(few["q"].llm, verb)(**arguments)
        beside = getattr(few["q"].llm, verb)(**arguments, job=True).result(timeout=60)
        assert type(beside) is type(alone) and beside.equals(alone)
    with pytest.raises(InvalidRequestError) as caught:
        getattr(few.llm, verb)("q", **arguments, job="yes")
    assert caught.value.parameter == "job"


def passes_of(frame: pd.DataFrame) -> dict[str, Callable[..., Any]]:
    """Calls that go over rows several times, by name."""
    few, right = frame.head(3), pd.DataFrame({"text": ["What is 0 + 0?", "A dog."]})
    own: dict[str, Any] = {"pooling": "mean", "use_tqdm": False}
    groups = frame.assign(k=[0, 1] * 6).groupby("k")
    near = {"left_on": "q", "right_on": "text", "candidates": 1, "threshold": 0.0}
    return {
        "dedup": partial(frame.llm.dedup, "q", 0.99, **own),
        "topk": partial(frame.llm.topk, "q", 2, query="What is 0 + 1?", **own),
        "topk by a question": partial(few.llm.topk, k=2, question="Is it a sum? {q}"),
        "sim_join": partial(frame.llm.sim_join, right, "q", "text", **own),
        "join": partial(few.llm.join, right, "Is '{q}' like '{text}'?", calibrate=True, **near),
        "summarize": partial(groups.llm.summarize, "q", sampling_params=GREEDY, max_tokens=8),
    }


@pytest.mark.parametrize("name", list(passes_of(pd.DataFrame({"q": ["?"] * 12}))))
def test_a_verb_of_several_passes_runs_beside_the_cell(
    llm: LLM, frame: pd.DataFrame, name: str
) -> None:
    call = passes_of(frame)[name]
    job = call(job=True)
    assert isinstance(job, FrameJob)
    result = job.result(timeout=60)
    pd.testing.assert_frame_equal(result, call())
    pd.testing.assert_frame_equal(job.frame, result)
    assert job.num_done == job.num_rows > 0 and job.stats.num_failed == 0


def test_a_cancelled_job_of_several_passes_leaves_what_it_knows(llm: LLM) -> None:
    frame = pd.DataFrame({"q": [f"{number} " + "word " * 300 for number in range(200)]})
    job = frame.llm.dedup("q", pooling="mean", dedupe=False, job=True, use_tqdm=False)
    while not job.num_done:
        assert not job.done()
    job.cancel()
    with pytest.raises(Interrupted) as caught:
        job.result(timeout=60)
    vectors = caught.value.partial
    assert vectors.index.equals(frame.index) and 0 < vectors.notna().sum() < 200
    assert nbllm.last is vectors and job.frame.notna().equals(vectors.notna())


def test_all_passes_of_a_call_are_one_progress(llm: LLM, frame: pd.DataFrame) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, count: int) -> None:
            self.done += count

        def close(self) -> None: ...

    call = passes_of(frame)["sim_join"]
    call(use_tqdm=Bar)
    (bar,) = bars
    assert bar.done == bar.total == 14


def test_a_conversation_goes_on_beside_the_cell(llm: LLM, frame: pd.DataFrame) -> None:
    expected = frame.llm.chat("q", GREEDY, reply="messages")
    job = frame.llm.chat("q", GREEDY, reply="messages", job=True)
    pd.testing.assert_frame_equal(job.result(timeout=60), expected)
    pd.testing.assert_frame_equal(
        asyncio.run(frame.llm.achat("q", GREEDY, reply="messages")), expected
    )


def test_a_job_that_is_neither_true_nor_false_is_refused(llm: LLM, frame: pd.DataFrame) -> None:
    for call in (frame.llm.retry, partial(frame.llm.lint, probe=0)):
        with pytest.raises(InvalidRequestError) as caught:
            call(column_or_template="q", job="yes")
        assert caught.value.parameter == "job"


def test_a_table_has_no_job(llm: LLM) -> None:
    table = pytest.importorskip("polars").DataFrame({"q": ["What is 1 + 1?"]})
    with pytest.raises(InvalidRequestError) as caught:
        table.llm.score("q", job=True)
    assert caught.value.parameter == "job"


def test_a_cell_is_answered_while_a_job_fills_the_batch(home: Path) -> None:
    frame = pd.DataFrame({"q": [f"Story {number}." for number in range(6)]})
    params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    with LLM(device="cpu", dtype="float32", max_num_seqs=2) as llm:
        job = frame.llm.submit("q", params, llm=llm, use_tqdm=False)
        while llm.get_metrics()["num_requests_running"] < 2:
            assert not job.done()
        llm.generate(["What is 1 + 1?", "What is 2 + 1?"], GREEDY, use_tqdm=False)
        assert job.num_done == 0  # a row takes 300 steps, the answers took a few
        job.cancel()
        with pytest.raises(Interrupted):
            job.result(timeout=60)
