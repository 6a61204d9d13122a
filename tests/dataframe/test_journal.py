"""Journal: what was appended is found again, whatever happened in between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbllm import JournalError
from nbllm.dataframe.journal import Journal, RowResult, count_rows

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.floats(allow_nan=False)
TOKENS = st.integers(0, 2**32 - 1)
LOGPROB = {"token": st.none() | TEXTS, "token_id": TOKENS, "logprob": NUMBERS}
CHOSEN = st.fixed_dictionaries(
    LOGPROB | {"top": st.lists(st.fixed_dictionaries(LOGPROB), max_size=2)}
)
ROWS = st.dictionaries(
    st.binary(min_size=32, max_size=32),
    st.builds(
        RowResult,
        texts=st.lists(TEXTS, max_size=3),
        token_ids=st.lists(st.lists(TOKENS, max_size=4), max_size=3),
        finish_reasons=st.lists(st.sampled_from(["stop", "length"]), max_size=3),
        num_tokens=st.lists(st.integers(0, 2**40), max_size=3),
        num_prompt_tokens=st.integers(0, 2**40),
        num_cached_tokens=st.integers(0, 2**40),
        numbers=st.lists(NUMBERS, max_size=4),
        logprobs=st.lists(st.lists(CHOSEN, max_size=2), max_size=2),
    ),
    max_size=20,
)
ROW = RowResult(texts=["Paris"], token_ids=[[5, 6]], finish_reasons=["stop"], num_tokens=[2])
KEYS = [bytes([i]) * 32 for i in range(100)]


def fill(folder: Path, keys: list[bytes]) -> None:
    with Journal(folder) as journal:
        for key in keys:
            journal.append(key, ROW)


@settings(max_examples=20, deadline=None)
@given(parts=st.lists(ROWS, max_size=3))
def test_what_was_appended_is_found_when_it_is_opened_again(
    parts: list[dict[bytes, RowResult]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    expected: dict[bytes, RowResult] = {}
    for part in parts:
        with Journal(folder) as journal:
            for key, result in part.items():
                journal.append(key, result)
        expected |= part
    with Journal(folder) as journal:
        assert len(journal) == len(expected)
        assert all(journal.get(key) == result for key, result in expected.items())
        assert journal.get(b"\xff" * 31 + b"\x00") in (None, expected.get(b"\xff" * 31 + b"\x00"))


def test_a_result_reaches_the_disk_without_being_asked(tmp_path: Path) -> None:
    with Journal(tmp_path, flush_s=0.01) as journal:
        journal.append(KEYS[0], ROW)
        while count_rows(tmp_path) < 1:
            pass
    assert [path.name for path in tmp_path.glob("part-*")] == ["part-00000001.parquet"]


def test_a_part_that_was_being_written_when_its_process_died_is_never_read(tmp_path: Path) -> None:
    fill(tmp_path, KEYS[:2])
    part = next(tmp_path.glob("part-*.parquet"))
    torn = tmp_path / "part-00000002.parquet.tmp"
    torn.write_bytes(part.read_bytes()[:100])
    with Journal(tmp_path) as journal:
        assert len(journal) == 2
    assert not torn.exists()


def test_many_small_parts_are_made_one(tmp_path: Path) -> None:
    for key in KEYS[:70]:
        fill(tmp_path, [key])
    with Journal(tmp_path) as journal:
        assert all(journal.get(key) == ROW for key in KEYS[:70])
    assert len(list(tmp_path.glob("part-*"))) < 10
    with Journal(tmp_path) as journal:
        assert len(journal) == 70


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", None])
def test_a_damaged_part_is_named(tmp_path: Path, content: bytes | None) -> None:
    fill(tmp_path, KEYS[:2])
    part = next(tmp_path.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-40] if content is None else content)
    with pytest.raises(JournalError, match=part.name):
        Journal(tmp_path)
    part.unlink()
    with Journal(tmp_path) as journal:  # and the lock was let go
        assert len(journal) == 0


def test_a_part_of_another_version_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"key": [b"x"]}), tmp_path / "part-00000001.parquet")
    with pytest.raises(JournalError, match="another version"):
        Journal(tmp_path)


def test_a_part_from_before_there_were_cached_tokens_and_logprobs_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.list_(pa.string())
    old = pa.schema(
        {
            "key": pa.binary(32),
            "texts": texts,
            "token_ids": pa.list_(pa.list_(pa.uint32())),
            "finish_reasons": texts,
            "num_tokens": pa.list_(pa.int64()),
            "num_prompt_tokens": pa.int64(),
            "numbers": pa.list_(pa.float64()),
        }
    )
    row = {"texts": ["Rome"], "token_ids": [[7]], "finish_reasons": ["stop"], "num_tokens": [1]}
    rows = [{"key": KEYS[0], "num_prompt_tokens": 5, "numbers": [-0.5, 1.0], **row}]
    parquet.write_table(pa.Table.from_pylist(rows, old), tmp_path / "part-00000001.parquet")
    fill(tmp_path, [KEYS[1]])
    with Journal(tmp_path) as journal:
        found = journal.get(KEYS[0])
        assert found == RowResult(num_prompt_tokens=5, numbers=[-0.5, 1.0], **row)
        assert found is not None and found.num_cached_tokens == 0 and found.logprobs == []
        assert journal.get(KEYS[1]) == ROW


def test_only_one_job_writes_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(JournalError, match="another job"):
        Journal(tmp_path)
    with Journal(tmp_path):
        pass


def test_a_folder_that_can_not_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="can't be written"):
        Journal(tmp_path / "file" / "journal")


def test_nothing_is_appended_after_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.append(KEYS[0], ROW)


FULL_DISK = """
import resource, sys
from pathlib import Path
from nbllm import JournalError
from nbllm.dataframe.journal import Journal, RowResult

folder = Path(sys.argv[1])
with Journal(folder) as journal:
    journal.append(b"a" * 32, RowResult(texts=["safe"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # as if the disk were full
journal = Journal(folder, flush_s=0.01)
try:
    while True:
        journal.append(b"b" * 32, RowResult(texts=["lost"]))
except JournalError as error:
    print(error)
try:
    journal.close()
except JournalError as error:
    print("close:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files there")
def test_a_full_disk_is_an_error_and_earlier_rows_are_safe(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert "could not be written" in first and "safe" in first
    assert second.startswith("close:")
    assert [path.name for path in tmp_path.glob("part-*")] == ["part-00000001.parquet"]
    with Journal(tmp_path) as journal:
        assert journal.get(b"a" * 32) == RowResult(texts=["safe"])
