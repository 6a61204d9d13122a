"""paged_attention: launches of the attention kernels, by kind of row.

Decode rows (one new token) share a small tile with their group's heads; where they are too few to
fill the device, the keys of each are split among several programs and merged. Prompt chunks take
tiles of 64 rows or more, which is what Hopper's wgmma wants. In batch-invariant mode every row goes
the way of the prompt chunks, unsplit.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata, rows_per_prefix_tile
from nbllm_kernels.gpu.attention_kernel import paged_attention_kernel
from nbllm_kernels.gpu.decode_attention import (
    LaunchShape,
    Scores,
    decode_attention,
    merge_splits,
    padded_dim,
)
from nbllm_kernels.gpu.store_kv import check_cache
from nbllm_kernels.gpu.validation import (
    describe,
    require,
    require_float,
    require_index,
    require_like,
)

_MAX_GROUP = 128


def chunk_shape(dtype: torch.dtype, head_dim: int, group: int) -> LaunchShape:
    """The fixed table: depends on the model alone, never on the batch."""
    if dtype == torch.float32:
        # Products on the plain cores in full precision: small tiles, or registers spill.
        block_m = max(16, triton.next_power_of_2(group))
        return LaunchShape(block_m, 32 if head_dim <= 128 else 16, 4, 2)
    if head_dim <= 64:
        return LaunchShape(128, 64, 4, 3)
    return LaunchShape(128, 64, 8, 3 if head_dim <= 128 else 2)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See `nbllm_kernels.paged_attention`.

    Slots that no row sees are not read: they may hold anything.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    _check(query, key_cache, value_cache, metadata, sliding_window, softcap)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    scores = Scores.make(scale, sliding_window, softcap)
    num_seqs = metadata.seq_lens.shape[0]
    num_decodes = 0 if metadata.batch_invariant else metadata.num_decode_seqs
    if num_decodes:
        split = decode_attention(query, key_cache, value_cache, metadata, scores, output)
        if split is not None:
            merge_splits(split, output)
    if num_decodes < num_seqs:
        _launch_chunks(query, key_cache, value_cache, metadata, scores, output, num_decodes)
    return output


def _launch_chunks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    scores: Scores,
    output: Tensor,
    first_seq: int,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = key_cache.shape
    num_seqs = metadata.seq_lens.shape[0]
    group = num_heads // num_kv_heads
    shape = chunk_shape(query.dtype, head_dim, group)
    num_blocks = (num_tokens - first_seq) // (shape.block_m // group) + num_seqs - first_seq
    paged_attention_kernel[(num_blocks, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        output,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_tables,
        first_seq,
        num_seqs - first_seq,
        query.stride(0),
        metadata.block_tables.stride(0),
        scores.scale,
        scores.scale_out,
        scores.window or 0,
        STRIDE_Q_HEAD=query.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        HAS_WINDOW=scores.window is not None,
        HAS_SOFTCAP=scores.softcap is not None,
        PRECISION="ieee",
        num_warps=shape.num_warps,
        enable_fp_fusion=True,
        num_stages=shape.num_stages,
    )


def check_attention(
    num_heads: int,
    key_cache: Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """What every attention kernel asks of shapes, lengths and block tables.

    Raises:
        ValueError: something does not fit.
    """
    _, num_kv_heads, page_size, head_dim = key_cache.shape
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        lambda: f"{num_heads} query heads do not fit the cache {describe(key_cache)}",
    )
    require(head_dim <= 256, lambda: f"head_dim is {head_dim}, at most 256")
    require(
        num_heads // num_kv_heads <= _MAX_GROUP,
        lambda: (
            f"{num_heads} query heads for {num_kv_heads} key heads: at most {_MAX_GROUP} for each"
        ),
    )
    require(
        sliding_window is None or sliding_window > 0, lambda: f"sliding_window is {sliding_window}"
    )
    require(softcap is None or softcap > 0, lambda: f"softcap is {softcap}")
    num_seqs, tables = metadata.seq_lens.shape[0], metadata.block_tables
    require_index("seq_lens", metadata.seq_lens, (num_seqs,), torch.int32, key_cache.device)
    require(
        tables.ndim == 2
        and tables.shape[0] == num_seqs
        and tables.dtype == torch.int32
        and tables.stride(1) == 1,
        lambda: f"block_tables must be [{num_seqs}, max_blocks] int32: {describe(tables)}",
    )
    require_like("block_tables", tables, metadata.seq_lens)
    require(
        tables.shape[1] * page_size >= metadata.max_seq_len,
        lambda: (
            f"block_tables have {tables.shape[1]} pages of {page_size} tokens, "
            f"and a sequence has {metadata.max_seq_len}"
        ),
    )
    require(0 <= metadata.num_decode_seqs <= num_seqs, lambda: "num_decode_seqs is out of range")


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    require_float("query", query, 3)
    check_cache(key_cache, value_cache, query)
    _, num_heads, head_dim = query.shape
    num_kv_heads, num_seqs = key_cache.shape[1], metadata.seq_lens.shape[0]
    require(
        key_cache.shape[3] == head_dim,
        lambda: f"query {describe(query)} does not fit the cache {describe(key_cache)}",
    )
    check_attention(num_heads, key_cache, metadata, sliding_window, softcap)
    device = query.device
    shape = (num_seqs + 1,)
    require_index("query_start_loc", metadata.query_start_loc, shape, torch.int32, device)
    prefix = metadata.shared_prefix
    if prefix is not None:
        require_index("shared_prefix.lens", prefix.lens, (num_seqs,), torch.int32, device)
        tiles = (prefix.tile_rows.shape[0], rows_per_prefix_tile(num_heads, num_kv_heads))
        require_index("shared_prefix.tile_rows", prefix.tile_rows, tiles, torch.int32, device)
