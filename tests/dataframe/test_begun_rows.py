"""Rows that a crash or Ctrl-C cuts go on after the tokens that they had."""

from __future__ import annotations

import signal
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nbllm
from nbllm import LLM, Interrupted, SamplingParams
from nbllm.dataframe.journal import Journal, RowResult

LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"q": ["Tell me a story.", "What is 1 + 1?", "Go on."]})


def num_generated(llm: LLM) -> int:
    return int(llm.get_metrics()["generation_tokens"])


def num_begun(home: Path, job: str) -> list[int]:
    """Tokens of each row in the file."""
    table = pq.read_table(home / "jobs" / job / "begun.parquet")
    return [sum(len(text) // 4 for text in texts) for texts in table["token_ids"].to_pylist()]


class Interrupting:
    """A progress bar whose call gets Ctrl-C when a row has ended."""

    def __init__(self, **_: Any) -> None: ...

    def update(self, count: int) -> None:
        if count:
            raise KeyboardInterrupt

    def close(self) -> None: ...


KILLED = """
import functools, os, signal
import pandas as pd
import pyarrow.parquet as pq
from nbllm import LLM, SamplingParams
from nbllm.dataframe import jobs

path = os.path.join(os.environ["NBLLM_HOME"], "jobs", "long", "begun.parquet")
write = os.replace

def replace(before, after):  # the process dies right after the file was written with enough in it
    write(before, after)
    if str(after) == path:
        texts = pq.read_table(path)["token_ids"].to_pylist()
        if min(len(text) for row in texts for text in row) >= 4 * 60:
            os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
jobs.Journal = functools.partial(jobs.Journal, flush_s=0.1)
llm = LLM(device="cpu", dtype="float32")
frame = pd.DataFrame({"q": ["Tell me a story.", "What is 1 + 1?", "Go on."]})
params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
frame.llm.generate("q", params, journal="long", use_tqdm=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_job_goes_on_in_the_middle_of_its_rows(
    llm: LLM, frame: pd.DataFrame, home: Path
) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    begun = num_begun(home, "long")
    assert len(begun) == 3 and min(begun) >= 60
    before = num_generated(llm)
    resumed = nbllm.resume("long", llm=llm)
    assert num_generated(llm) - before == 3 * 400 - sum(begun)
    pd.testing.assert_frame_equal(resumed, frame.llm.generate("q", LONG))
    assert not (home / "jobs" / "long" / "begun.parquet").exists()


def test_an_interrupted_job_goes_on_in_the_middle_of_its_rows(
    llm: LLM, frame: pd.DataFrame, home: Path
) -> None:
    params = [LONG.clone(max_tokens=n) for n in (400, 50, 300)]
    whole = frame.llm.generate("q", params)
    with pytest.raises(Interrupted):
        frame.llm.generate("q", params, journal="cut", use_tqdm=Interrupting)
    begun = num_begun(home, "cut")
    assert len(begun) == 2 and min(begun) >= 40  # where the short row ended
    before = num_generated(llm)
    again = frame.llm.generate("q", params, journal="cut")
    assert num_generated(llm) - before == 700 - sum(begun)
    pd.testing.assert_frame_equal(again, whole)


def test_a_job_that_is_cut_twice_keeps_rows_that_it_had_not_come_to(llm: LLM, home: Path) -> None:
    frame = pd.DataFrame({"q": [f"Story {number}." for number in range(4)]})
    params = [LONG.clone(max_tokens=n) for n in (400, 60, 400, 30)]
    for _ in range(2):
        with pytest.raises(Interrupted):
            frame.llm.generate("q", params, journal="twice", use_tqdm=Interrupting)
    begun = num_begun(home, "twice")
    assert len(begun) == 3 and min(begun) > 20
    before = num_generated(llm)
    again = frame.llm.generate("q", params, journal="twice")
    assert num_generated(llm) - before == 860 - sum(begun)
    pd.testing.assert_frame_equal(again, frame.llm.generate("q", params))


def test_texts_side_by_side_go_on_each(llm: LLM, home: Path) -> None:
    frame = pd.DataFrame({"q": ["Tell me a story.", "Go on."]})
    several = SamplingParams(n=2, temperature=0.8, seed=3, max_tokens=300, stop=["."])
    params = [several.clone(ignore_eos=True), LONG.clone(max_tokens=20)]
    whole = frame.llm.generate("q", params)
    with pytest.raises(Interrupted):
        frame.llm.generate("q", params, journal="n", use_tqdm=Interrupting)
    again = frame.llm.generate("q", params, journal="n")
    assert again["llm"].tolist() == whole["llm"].tolist()


def test_rows_with_logprobs_begin_anew(llm: LLM, frame: pd.DataFrame, home: Path) -> None:
    params = [LONG.clone(max_tokens=n) for n in (60, 20, 60)]
    with pytest.raises(Interrupted):
        frame.llm.generate("q", params, include=["conf"], journal="conf", use_tqdm=Interrupting)
    assert not (home / "jobs" / "conf" / "begun.parquet").exists()
    again = frame.llm.generate("q", params, include=["conf"], journal="conf")
    pd.testing.assert_frame_equal(again, frame.llm.generate("q", params, include=["conf"]))


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_a_damaged_file_costs_its_tokens_only(
    llm: LLM, frame: pd.DataFrame, home: Path, content: bytes | None
) -> None:
    folder = home / "jobs" / "bad"
    folder.mkdir(parents=True)
    if content is None:
        pq.write_table(pa.table({"key": ["no key"]}), folder / "begun.parquet")
    else:
        (folder / "begun.parquet").write_bytes(content)
    params = LONG.clone(max_tokens=8)
    answered = frame.llm.generate("q", params, journal="bad")
    pd.testing.assert_frame_equal(answered, frame.llm.generate("q", params))


def test_short_rows_are_not_written(llm: LLM, tmp_path: Path) -> None:
    key, other = bytes(32), bytes([1] * 32)
    rows: dict[bytes, list[array[int]]] = {key: [array("I", [1, 2])]}
    with Journal(tmp_path, flush_s=60.0) as journal:
        journal._begun.update(rows, is_last=False)
        assert not (tmp_path / "begun.parquet").exists()
        journal._begun.update(rows | {other: [array("I", [3])]}, is_last=False)
        assert pq.read_table(tmp_path / "begun.parquet")["key"].to_pylist() == [key]
        journal.append(key, RowResult(texts=["done"]))
        assert journal.begun(key) == []
