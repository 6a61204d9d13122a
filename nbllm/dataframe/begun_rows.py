"""BegunRows: the tokens of rows that have not ended, in one file beside the parts of a journal.

    <folder>/begun.parquet   the key of each row, and the token ids of its texts so far

A row of a few thousand tokens is minutes of work. A job that goes on after a crash, or after
Ctrl-C, prefills the prompt with these tokens and generates the rest.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAME = "begun.parquet"


class BegunRows:
    """What is known of rows that have not ended, by key.

    Args:
        folder: of the journal.
        arrow: pyarrow.
        write_whole: (path, what writes to a file) -> replaces the file.
    """

    def __init__(self, folder: Path, arrow: Any, write_whole: Any) -> None:
        self._path = folder / _NAME
        self._arrow = arrow
        self._write_whole = write_whole
        self._in_flight: set[bytes] = set()  # at the last `update`
        self._texts = self._read()
        self._on_disk = set(self._texts)

    def get(self, key: bytes) -> list[array[int]]:
        """Token ids of each text of a row, or an empty list."""
        return [_as_ids(text) for text in self._texts.get(key, ())]

    def discard(self, key: bytes) -> None:
        """The row has ended."""
        self._texts.pop(key, None)

    def update(self, rows: Mapping[bytes, Sequence[array[int]]], *, is_last: bool) -> None:
        """Write the rows in flight that were so at the last call, too: a short row is not worth it.

        Args:
            rows: token ids of each text so far.
            is_last: nothing runs any more: all are written.

        Raises:
            OSError: the file can't be written; what was there is left.
        """
        kept = rows if is_last else rows.keys() & self._in_flight
        self._in_flight = set(rows)
        for key in kept:
            self._texts[key] = [_as_bytes(token_ids) for token_ids in rows[key]]
        if kept or self._texts.keys() != self._on_disk:
            self._write()

    def _write(self) -> None:
        texts, arrow = self._texts.copy(), self._arrow
        self._on_disk = set(texts)
        if not texts:
            self._path.unlink(missing_ok=True)
            return
        table = arrow.table(
            {"key": list(texts), "token_ids": list(texts.values())}, schema=_schema(arrow)
        )
        self._write_whole(
            self._path, lambda file: arrow.parquet.write_table(table, file, compression="zstd")
        )

    def _read(self) -> dict[bytes, list[bytes]]:
        """What is in the file; nothing if it is not one: then rows begin anew."""
        arrow = self._arrow
        try:
            table = arrow.parquet.read_table(self._path, schema=_schema(arrow))
        except (OSError, ValueError, arrow.ArrowException):
            return {}
        return dict(zip(table["key"].to_pylist(), table["token_ids"].to_pylist(), strict=True))


def _schema(arrow: Any) -> Any:
    """Ids are 32-bit numbers, little end first."""
    return arrow.schema({"key": arrow.binary(32), "token_ids": arrow.list_(arrow.binary())})


def _as_bytes(token_ids: array[int]) -> bytes:
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _as_ids(text: bytes) -> array[int]:
    ids = array("I")
    ids.frombytes(text)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
