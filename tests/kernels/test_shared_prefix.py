"""Attention with a shared prefix is attention: the same numbers, whoever shares what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nbllm_kernels import AttentionMetadata, SharedPrefix, reference, rows_per_prefix_tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PagedBatch = Callable[..., tuple[Tensor, Tensor, Tensor, AttentionMetadata]]


def share(
    metadata: AttentionMetadata, groups: dict[tuple[int, ...], int], page_size: int, rows: int
) -> AttentionMetadata:
    """Give the rows of each group the first pages of its first row, so many of them."""
    tables = metadata.block_tables.clone()
    lens = torch.zeros_like(metadata.seq_lens)
    tiles: list[list[int]] = []
    for members, num_pages in groups.items():
        tables[list(members), :num_pages] = tables[members[0], :num_pages].clone()
        lens[list(members)] = num_pages * page_size
        for first in range(0, len(members), rows):
            tile = list(members[first : first + rows])
            tiles.append(tile + [-1] * (rows - len(tile)))
    tiles.insert(1, [-1] * rows)  # an empty one, as a captured graph has
    tile_rows = torch.tensor(tiles, dtype=torch.int32, device=tables.device)
    return replace(metadata, block_tables=tables, shared_prefix=SharedPrefix(lens, tile_rows))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "multiprocessors"),
    # Own keys split; not split, and merged at once with a prefix in one piece or several.
    [(4, 2, 64, 16, 132), (8, 1, 128, 64, 1), (2, 2, 80, 32, 20), (14, 2, 64, 64, 20)],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sliding_window": 40}], ids=str)
def test_the_output_is_that_of_plain_attention(
    paged_batch: PagedBatch,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    multiprocessors: int,
    options: dict[str, Any],
) -> None:
    from nbllm_kernels.gpu import decode_attention
    from nbllm_kernels.gpu.paged_attention import paged_attention

    monkeypatch.setattr(decode_attention, "num_multiprocessors", lambda _: multiprocessors)
    # Two groups, a row on its own, and two chunks of prompts in the same step.
    seq_lens = [3 * page_size + 5, 3 * page_size + 1, 40, 5 * page_size, 2 * page_size + 9, 200]
    query, keys, values, metadata = paged_batch(
        [(1, n) for n in seq_lens] + [(30, 95), (16, 16)],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    rows = rows_per_prefix_tile(num_heads, num_kv_heads)
    shared = share(metadata, {(0, 1, 3): 3, (4, 5): 2}, page_size, rows)
    options = {"scale": head_dim**-0.5} | options
    output = paged_attention(query, keys, values, shared, **options)
    expected = reference.paged_attention(
        query.double(), keys.double(), values.double(), shared, **options
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_many_rows_take_several_tiles(paged_batch: PagedBatch) -> None:
    from nbllm_kernels.gpu.paged_attention import paged_attention

    seq_lens = [2 * 16 + 1 + i for i in range(20)]
    query, keys, values, metadata = paged_batch(
        [(1, n) for n in seq_lens], num_heads=8, num_kv_heads=1, dtype=torch.float16
    )
    shared = share(metadata, {tuple(range(20)): 2}, 16, rows_per_prefix_tile(8, 1))
    assert shared.shared_prefix is not None and len(shared.shared_prefix.tile_rows) == 4
    output = paged_attention(query, keys, values, shared, scale=0.1)
    expected = reference.paged_attention(
        query.double(), keys.double(), values.double(), shared, scale=0.1
    )
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)
