"""Sequences are grouped by the pages that they share, and by nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbllm.engine import shared_prefix
from nbllm.engine.shared_prefix import tile_shared_prefixes


def tables(*rows: list[int]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows])


def tile(block_tables: np.ndarray, full: list[int], num_tiles: int = 3, rows: int = 2):
    return tile_shared_prefixes(
        block_tables, full, block_size=4096, num_tiles=num_tiles, rows_per_tile=rows
    )


def test_sequences_of_a_group_share_what_all_of_them_have_computed() -> None:
    table = tables([5, 6, 7, 1], [5, 6, 7, 2], [9, 8], [5, 6, 3], [9, 4])
    result = tile(table, [3, 4, 2, 3, 1])
    assert result is not None
    lens, tile_rows = result
    assert (lens // 4096).tolist() == [2, 2, 1, 2, 1]
    assert tile_rows.tolist() == [[0, 1], [3, -1], [2, 4]]


def test_pages_that_are_not_full_are_not_shared() -> None:
    assert tile(tables([5, 1], [5, 2]), [0, 1]) is None


def test_without_enough_to_save_there_are_no_groups() -> None:
    few = tile_shared_prefixes(
        tables([5, 1], [5, 2]), [1, 1], block_size=64, num_tiles=3, rows_per_tile=2
    )
    assert few is None
    assert tile(tables([5, 1], [6, 2], [7, 3]), [1, 1, 1]) is None


def test_groups_for_which_no_tile_is_left_go_without() -> None:
    result = tile(tables([5, 6, 1], [5, 6, 2], [7, 1], [7, 2]), [2, 2, 1, 1], num_tiles=1)
    assert result is not None
    assert (result[0] // 4096).tolist() == [2, 2, 0, 0]


@given(st.data())
def test_every_tile_is_right(data: st.DataObject) -> None:
    num_seqs = data.draw(st.integers(1, 12))
    rows = [data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)) for _ in range(num_seqs)]
    full = [data.draw(st.integers(0, 4)) for _ in range(num_seqs)]
    result = tile(tables(*rows), full, num_tiles=5, rows=3)
    if result is None:
        return
    lens, tile_rows = result
    seen = [row for rows_of_tile in tile_rows.tolist() for row in rows_of_tile if row >= 0]
    assert sorted(seen) == [seq for seq in range(num_seqs) if lens[seq]]
    for members in tile_rows.tolist():
        present = [row for row in members if row >= 0]
        assert members[: len(present)] == present
        for row in present:
            num_shared = lens[row] // 4096
            assert num_shared == lens[present[0]] // 4096 <= full[row]
            assert rows[row][:num_shared] == rows[present[0]][:num_shared]
    assert shared_prefix.MIN_SAVED_TOKENS > 0
