"""Journal: what the rows of a job came to, in append-only Parquet parts on disk.

    <folder>/
      job.json              what the job is, see `nbllm.dataframe.jobs`
      lock                  held by the one process that writes
      part-00000001.parquet rows that ended, with the key of each; written whole, never changed
      begun.parquet         rows that have not ended, see `nbllm.dataframe.begun_rows`
      part-....parquet.tmp  what was being written when a process died: never read

It is checkpoint and cache at once. A row's key is a hash of all that decides its result (weights,
token ids, sampling, schema), so a job that is run again, resumed after a crash or shares rows with
an earlier one finds what is known, whatever the frame's index or order. Rows that failed are not
kept: they are tried again.

Results wait in memory for at most `flush_s` seconds; a part is written under another name, flushed
to the disk and renamed, so that a reader sees all of it or nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from nbllm.dataframe.begun_rows import BegunRows
from nbllm.errors import JournalError

FLUSH_S = 1.0
_MAX_WAITING = 4096  # rows; more are written at once
_MERGE_PARTS = 64  # as many small parts are made one when a writer opens
_ADDED = ("num_cached_tokens", "logprobs")  # columns that parts of earlier versions lack


class TokenLogprob(TypedDict):
    """A token.

    Attributes:
        token: its text; None without a tokenizer.
        token_id: in the vocabulary.
        logprob: its log-probability, in nats.
    """

    token: str | None
    token_id: int
    logprob: float


class ChosenToken(TokenLogprob):
    """A generated token.

    Attributes:
        top: the likeliest tokens in its place, best first; none if no others were asked for.
    """

    top: list[TokenLogprob]


InFlight = Mapping[bytes, Sequence["array[int]"]]
"""Token ids of each text of rows that have not ended, by key."""


@dataclass(slots=True)
class RowResult:
    """What a row came to.

    Attributes:
        texts: one per completion (`n`); none of a row that was only scored or embedded.
        token_ids: of each text, in a job with a journal.
        finish_reasons: of each text: "stop" or "length".
        num_tokens: of each text.
        num_prompt_tokens: of the prompt.
        num_cached_tokens: those of them that were in the prefix cache when this was computed; 0 if
            a version wrote it that did not count them.
        numbers: what belongs to the verb: probabilities of labels, an embedding, or for each text
            its cumulative log-probability and smallest margin.
        logprobs: of each text, if they are wanted: a dict per token.
    """

    texts: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    numbers: Sequence[float] = field(default_factory=list)
    logprobs: list[list[ChosenToken]] = field(default_factory=list)


class Journal:
    """The rows that are known, and the writer of new ones. A context manager.

    Args:
        folder: made if it is not there.
        flush_s: how long a result may wait for the disk.

    Raises:
        JournalError: pyarrow is missing, the folder can't be written, another process writes to
            it, or a part is damaged.
    """

    def __init__(self, folder: Path, *, flush_s: float = FLUSH_S) -> None:
        self.folder = folder
        self._arrow = import_arrow()
        self._flush_s = flush_s
        self._waiting: list[tuple[bytes, RowResult]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._error: JournalError | None = None
        self._lock = _lock_folder(folder)
        self._followed: Callable[[], InFlight] | None = None
        self._left: InFlight | None = None  # of a call that was followed, to be written
        try:
            self._known = dict(self._read_parts())
            self._begun = BegunRows(folder, self._arrow, write_whole)
            self._next_part = 1 + max((_part_number(path) for path in _parts(folder)), default=0)
        except BaseException:
            self._lock.release()
            raise
        self._thread = threading.Thread(target=self._write, name="nbllm-journal", daemon=True)
        self._thread.start()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: bytes) -> RowResult | None:
        """What the row of a key came to, if that was known when the journal was opened."""
        return self._known.get(key)

    def begun(self, key: bytes) -> list[array[int]]:
        """Token ids that each text of a row had when a job was cut; an empty list if none."""
        return self._begun.get(key)

    @contextlib.contextmanager
    def following(self, in_flight: Callable[[], InFlight]) -> Iterator[None]:
        """Keep what rows in flight have so far, each `flush_s` seconds and at the end.

        Args:
            in_flight: gives token ids of each text of the rows in flight, by key; called in the
                journal's thread, and by the caller's at the end.
        """
        with self._changed:
            self._followed = in_flight
            self._changed.notify()
        left: InFlight = {}  # of a call that came to its end there is nothing to go on with
        try:
            yield
        except BaseException:
            left = in_flight()
            raise
        finally:
            with self._changed:
                self._followed, self._left = None, left
                self._changed.notify()

    def append(self, key: bytes, result: RowResult) -> None:
        """Keep a result; it is on the disk after `flush_s` seconds at the latest.

        Raises:
            JournalError: what was appended before could not be written.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._is_closed:
                raise JournalError(f"the journal {self.folder} is closed")
            self._begun.discard(key)
            self._waiting.append((key, result))
            if len(self._waiting) == 1 or len(self._waiting) >= _MAX_WAITING:
                self._changed.notify()

    def close(self) -> None:
        """Write what is waiting and let others write. Idempotent.

        Raises:
            JournalError: it could not be written.
        """
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._lock.release()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        """The writer's thread."""
        while True:
            with self._changed:
                while not (self._waiting or self._is_closed or self._followed or self._left):
                    self._changed.wait()
                if not self._is_closed and len(self._waiting) < _MAX_WAITING:
                    self._changed.wait(self._flush_s)
                rows, self._waiting = self._waiting, []
                left, self._left, followed = self._left, None, self._followed
            try:
                if rows:
                    self._write_part(rows)
                if left is not None:
                    self._begun.update(left, is_last=True)
                elif followed is not None:
                    self._begun.update(followed(), is_last=False)
            except Exception as error:
                with self._changed:
                    self._error = JournalError(
                        f"the journal {self.folder} could not be written ({error}); the rows of "
                        "the parts written before are safe"
                    )
                    self._error.__cause__ = error
                return
            if self._is_closed and not self._waiting and self._left is None:
                return

    def _write_part(self, rows: list[tuple[bytes, RowResult]]) -> None:
        arrow = self._arrow
        columns: dict[str, list[Any]] = {"key": [key for key, _ in rows]}
        for item in fields(RowResult):
            columns[item.name] = [getattr(result, item.name) for _, result in rows]
        table = arrow.table(columns, schema=_schema(arrow))
        path = self.folder / f"part-{self._next_part:08}.parquet"
        self._next_part += 1
        write_whole(path, lambda file: arrow.parquet.write_table(table, file, compression="zstd"))

    def _read_parts(self) -> Iterator[tuple[bytes, RowResult]]:
        paths = _parts(self.folder)
        rows = []
        for path in paths:
            rows += _read_part(self._arrow, path)
        if len(paths) >= _MERGE_PARTS:
            self._next_part = 1 + _part_number(paths[-1])
            self._write_part(rows)
            for path in paths:
                path.unlink()
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        yield from rows


def write_whole(path: Path, write: Any) -> None:
    """Make a file appear with all of its content, or not at all.

    Args:
        path: replaced if it is there.
        write: gets a binary file.

    Raises:
        OSError: the disk is full, the folder is read-only, ...; what was there is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _schema(arrow: Any) -> Any:
    texts = arrow.list_(arrow.string())
    return arrow.schema(
        {
            "key": arrow.binary(32),
            "texts": texts,
            "token_ids": arrow.list_(arrow.list_(arrow.uint32())),
            "finish_reasons": texts,
            "num_tokens": arrow.list_(arrow.int64()),
            "num_prompt_tokens": arrow.int64(),
            "num_cached_tokens": arrow.int64(),
            "numbers": arrow.list_(arrow.float64()),
            "logprobs": arrow.list_(logprobs_type(arrow)),
        }
    )


def logprobs_type(arrow: Any) -> Any:
    """The Arrow type of a text's log-probabilities."""
    token = {"token": arrow.string(), "token_id": arrow.int64(), "logprob": arrow.float64()}
    top = arrow.list_(arrow.struct(token))
    return arrow.list_(arrow.struct(token | {"top": top}))


def _read_part(arrow: Any, path: Path) -> list[tuple[bytes, RowResult]]:
    try:
        table = arrow.parquet.read_table(path)
        names = table.schema.names
        expected = [
            item for item in _schema(arrow) if item.name in names or item.name not in _ADDED
        ]
        if table.schema != arrow.schema(expected):
            raise ValueError("its columns are those of another version of nbllm")
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise JournalError(
            f"{path} can't be read ({error}): delete it, and its rows are computed again"
        ) from error
    return [(row.pop("key"), RowResult(**row)) for row in table.to_pylist()]


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _part_number(path: Path) -> int:
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else 0


def _lock_folder(folder: Path) -> Any:
    import filelock

    # A job beside the cell opens the journal in one thread and closes it in another.
    lock = filelock.FileLock(folder / "lock", thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise JournalError(
            f"another job writes to the journal {folder}; wait for it, or give this one another "
            "name"
        ) from None
    except (OSError, ValueError) as error:
        raise JournalError(f"the journal {folder} can't be written: {error}") from error
    return lock


def count_rows(folder: Path) -> int:
    """Rows in the parts of a journal, from their footers."""
    arrow = import_arrow()
    try:
        return sum(arrow.parquet.read_metadata(path).num_rows for path in _parts(folder))
    except (OSError, arrow.ArrowException) as error:
        raise JournalError(f"the journal {folder} can't be read: {error}") from error


def import_arrow() -> Any:
    """pyarrow with its Parquet part; JournalError without."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise JournalError("a journal needs pyarrow: pip install 'nbllm[dataframe]'") from error
    return pyarrow
