"""Which decoding sequences begin with the same pages, and how their attention is tiled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

MIN_SAVED_TOKENS = 4096
"""A group is worth a pass of its own if so many reads of a token's key and value are saved."""


def tile_shared_prefixes(
    block_tables: np.ndarray,
    num_full_blocks: Sequence[int],
    *,
    block_size: int,
    num_tiles: int,
    rows_per_tile: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Group sequences by their first pages, largest saving first while there are tiles.

    Sequences whose first page is the same form a group, and share the pages that all of them have
    in common. Only full pages are ever shared, and what is in them does not change.

    Args:
        block_tables: [num_seqs, max_blocks] page ids.
        num_full_blocks: pages of each sequence whose tokens are all computed.
        block_size: tokens in a page.
        num_tiles, rows_per_tile: shape of what is returned.

    Returns:
        (lens [num_seqs], tile_rows [num_tiles, rows_per_tile]) as in
        `nbllm_kernels.SharedPrefix`; None if no group is worth it.
    """
    by_first: defaultdict[int, list[int]] = defaultdict(list)
    for seq, page in enumerate(block_tables[:, 0].tolist()):
        if num_full_blocks[seq]:
            by_first[page].append(seq)
    groups: list[tuple[int, int, list[int]]] = []
    for seqs in by_first.values():
        if len(seqs) < 2:
            continue
        limit = min(num_full_blocks[seq] for seq in seqs)
        pages = block_tables[seqs, :limit]
        same = (pages == pages[0]).all(axis=0)
        num_shared = limit if same.all() else int(same.argmin())
        saved = (len(seqs) - 1) * num_shared * block_size
        if saved >= MIN_SAVED_TOKENS:
            groups.append((saved, num_shared, seqs))
    if not groups:
        return None
    lens = np.zeros(len(block_tables), dtype=np.int64)
    tile_rows = np.full((num_tiles, rows_per_tile), -1, dtype=np.int64)
    tile = 0
    for _, num_shared, seqs in sorted(groups, key=lambda group: -group[0]):
        if tile + -(-len(seqs) // rows_per_tile) > num_tiles:
            continue
        lens[seqs] = num_shared * block_size
        for first in range(0, len(seqs), rows_per_tile):
            rows = seqs[first : first + rows_per_tile]
            tile_rows[tile, : len(rows)] = rows
            tile += 1
    return lens, tile_rows
