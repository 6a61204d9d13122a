"""Cascade: attention metadata of a bucket whose decoding sequences may begin with the same pages.

On a GPU what they share is attended to once for all of them, see `nbllm_kernels.SharedPrefix`.
Which ones share what is a number in a buffer: one captured graph serves any grouping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nbllm.config import ModelConfig
from nbllm.engine.batch import Batch
from nbllm.engine.scheduler_output import ScheduledRequest
from nbllm.engine.shared_prefix import tile_shared_prefixes
from nbllm_kernels import AttentionMetadata, SharedPrefix, rows_per_prefix_tile

_MIN_ROWS = 8  # decoding sequences from which on it is looked for what they share
_MAX_GROUPS = 8
_PAGE_MULTIPLE = 16  # tokens: of the tiles of keys


@dataclass(slots=True)
class Cascade:
    """The way of a bucket's step by which shared pages are read once.

    Attributes:
        metadata: the bucket's, with a shared prefix.
        prefix: that prefix.
        is_filled: the sequences that it was last filled for share something that is worth it.
    """

    metadata: AttentionMetadata
    prefix: SharedPrefix
    is_filled: bool = False

    @classmethod
    def make(cls, metadata: AttentionMetadata, batch: Batch, config: ModelConfig) -> Cascade | None:
        """For a bucket, or None if no kernel reads what its sequences share on its own."""
        num_rows, num_seqs = metadata.num_decode_seqs, len(metadata.seq_lens)
        if batch.device.type != "cuda" or num_rows < _MIN_ROWS or batch.batch_invariant:
            return None
        if batch.block_size % _PAGE_MULTIPLE:
            return None
        rows_per_tile = rows_per_prefix_tile(config.num_heads, config.num_kv_heads)
        tiles = (-(-num_rows // rows_per_tile) + _MAX_GROUPS - 1, rows_per_tile)
        prefix = SharedPrefix(
            lens=torch.zeros(num_seqs, dtype=torch.int32, device=batch.device),
            tile_rows=torch.full(tiles, -1, dtype=torch.int32, device=batch.device),
        )
        return cls(replace(metadata, shared_prefix=prefix, scratch={}), prefix)

    def fill(self, batch: Batch, decodes: Sequence[ScheduledRequest]) -> None:
        """Look what the decoding sequences share, and send it.

        Args:
            batch: up to date with the step.
            decodes: in the step's order.
        """
        num_tiles, rows_per_tile = self.prefix.tile_rows.shape
        tiled = tile_shared_prefixes(
            batch.host_tables[[batch.rows[item.request] for item in decodes]],
            [item.start // batch.block_size for item in decodes],
            block_size=batch.block_size,
            num_tiles=num_tiles,
            rows_per_tile=rows_per_tile,
        )
        if tiled is None:
            if self.is_filled:
                self.prefix.lens.zero_()
                self.prefix.tile_rows.fill_(-1)
            self.is_filled = False
            return
        self.is_filled = True
        lens, tile_rows = batch.to_device(tiled[0], tiled[1].ravel())
        self.prefix.lens.zero_()
        self.prefix.lens[: len(decodes)] = lens.to(torch.int32)
        self.prefix.tile_rows.copy_(tile_rows.view(self.prefix.tile_rows.shape))
