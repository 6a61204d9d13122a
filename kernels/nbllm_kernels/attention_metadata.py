"""AttentionMetadata: where the tokens of a step's batch stand, as the attention kernels take it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Decode rows that begin with the same pages; on a GPU these are read once for all of them.
    Pages have a multiple of 16 tokens.

    Attributes:
        lens: [num_seqs] int32, tokens in the pages that a row shares, whole pages; 0 is none.
        tile_rows: [num_tiles, rows_per_tile] int32, rows that share the same pages, from the front
            of each tile; -1 is none. See `rows_per_prefix_tile`.
    """

    lens: Tensor
    tile_rows: Tensor


def rows_per_prefix_tile(num_heads: int, num_kv_heads: int) -> int:
    """Rows of `SharedPrefix.tile_rows`: their query heads of one group fill a tile of 64, the least
    that Hopper's wgmma takes."""
    return max(64 // (num_heads // num_kv_heads), 1)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The batch of one step: `num_seqs` sequences whose new tokens lie one after another.

    Attributes:
        query_start_loc: [num_seqs + 1] int32, prefix sums of the numbers of new tokens. Tokens past
            the last of them belong to no sequence, and their outputs mean nothing.
        seq_lens: [num_seqs] int32, tokens of each sequence in the cache, this step's included.
        block_tables: [num_seqs, max_blocks] int32; entries past a sequence's need are any valid
            page.
        slot_mapping: [num_tokens] int64, block_id * block_size + offset of each new token; a
            negative slot is not stored.
        max_query_len: the largest number of new tokens.
        max_seq_len: the largest of `seq_lens`, or more.
        num_decode_seqs: the first so many sequences have exactly one new token.
        batch_invariant: compute each row by the same operations in the same order whatever else
            is in the batch.
        scratch: what the layers of one step share on the CPU: buffers, masks, indices.
        shared_prefix: of the decode rows, or None; rows with a sliding window don't use it.
        prompt_lens: [num_seqs] int64, for models whose rotary embedding depends on the length of
            the text; None otherwise, or if no sequence computes tokens of its prompt.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_seqs: int
    batch_invariant: bool = False
    shared_prefix: SharedPrefix | None = None
    prompt_lens: Tensor | None = None
    scratch: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
