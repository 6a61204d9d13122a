"""Launches of the decode kernels: how many splits, and where they are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata, SharedPrefix
from nbllm_kernels.gpu.decode_attention_kernel import decode_attention_kernel, merge_splits_kernel
from nbllm_kernels.gpu.device import num_multiprocessors
from nbllm_kernels.gpu.prefix_attention_kernel import prefix_attention_kernel
from nbllm_kernels.gpu.programmatic_launch import launch_options

LOG2_E = 1.4426950408889634
_MAX_SPLITS = 16
_MAX_PREFIX_SPLITS = 8


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """Tile and launch sizes of one variant of a kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Scores:
    """How q k^T becomes scores in base 2: see the kernels' arguments of these names."""

    scale: float
    scale_out: float
    window: int | None
    softcap: float | None

    @classmethod
    def make(cls, scale: float, window: int | None, softcap: float | None) -> Scores:
        """From what `nbllm_kernels.paged_attention` takes."""
        if softcap is None:
            return cls(scale * LOG2_E, 1.0, window, None)
        return cls(scale / softcap, softcap * LOG2_E, window, softcap)


@dataclass(frozen=True, slots=True)
class SplitAttention:
    """Attention over parts of the keys, to be merged by the parts' log-sum-exp.

    Attributes:
        partial: [num_rows, num_heads, num_splits, head_dim], each split normalized.
        lse: [num_rows, num_heads, num_splits] float32, in base 2.
        prefix: what the rows share, if anything.
        num_prefix_splits: the first so many splits are of the shared prefix; they are not written
            for rows that share nothing.
    """

    partial: Tensor
    lse: Tensor
    prefix: SharedPrefix | None
    num_prefix_splits: int


def decode_shape(dtype: torch.dtype, head_dim: int, group: int) -> LaunchShape:
    """The fixed table: depends on the model alone, never on the batch."""
    block_m = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        # Products on the plain cores in full precision: small tiles and many warps, or registers
        # spill, and then the driver takes gigabytes for the stacks and never gives them back.
        return LaunchShape(block_m, 16, 8, 2 if head_dim <= 128 else 1)
    return LaunchShape(block_m, 64, 4, 3 if head_dim <= 128 else 2)


def choose_num_splits(num_programs: int, num_tiles: int, num_multiprocessors: int) -> int:
    """Programs among which the keys of a row are split.

    Enough for two programs per multiprocessor; one if there are enough rows. Of the lengths only
    the largest possible one counts: with `max_seq_len` the model's, as in a captured graph, the
    choice is a function of the number of rows.
    """
    if 2 * num_programs > num_multiprocessors:
        return 1
    wanted = triton.cdiv(2 * num_multiprocessors, max(num_programs, 1))
    return max(1, min(wanted, num_tiles, _MAX_SPLITS))


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    scores: Scores,
    output: Tensor,
) -> SplitAttention | None:
    """Attention of the first `num_decode_seqs` rows.

    Args:
        query, key_cache, value_cache, metadata: as in `nbllm_kernels.paged_attention`.
        scores: how they are scaled.
        output: [num_tokens, num_heads, head_dim], written if the keys are not split.

    Returns:
        what is to be merged, or None.
    """
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = key_cache.shape
    num_rows, device = metadata.num_decode_seqs, query.device
    group = num_heads // num_kv_heads
    shape = decode_shape(query.dtype, head_dim, group)
    num_splits = num_own_splits(metadata, scores, shape, num_kv_heads)
    prefix = metadata.shared_prefix if scores.window is None else None
    num_prefix_splits = 0 if prefix is None else _num_prefix_splits(prefix, num_rows, num_kv_heads)
    # What is not split by this kernel is merged by it.
    merged_splits = num_prefix_splits if num_splits == 1 else 0
    total_splits = num_splits + num_prefix_splits - merged_splits
    split = None
    partial = lse = output
    if total_splits > 1 or prefix is not None:
        rows = (num_rows, num_heads, merged_splits or total_splits)
        partial = torch.empty((*rows, head_dim), dtype=query.dtype, device=device)
        lse = torch.empty(rows, dtype=torch.float32, device=device)
        split = SplitAttention(partial, lse, prefix, num_prefix_splits)
    if prefix is not None and split is not None:
        _attend_to_prefix(query, key_cache, value_cache, metadata, prefix, scores, split)
    decode_attention_kernel[(num_rows, num_kv_heads, num_splits)](
        query,
        key_cache,
        value_cache,
        output if total_splits == 1 else partial,
        lse,
        metadata.seq_lens,
        metadata.seq_lens if prefix is None else prefix.lens,
        partial,
        lse,
        metadata.block_tables,
        query.stride(0),
        metadata.block_tables.stride(0),
        scores.scale,
        scores.scale_out,
        scores.window or 0,
        total_splits,
        merged_splits,
        STRIDE_Q_HEAD=query.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        IS_SPLIT=total_splits > 1,
        MERGES=merged_splits > 0,
        HAS_PREFIX=prefix is not None,
        HAS_WINDOW=scores.window is not None,
        HAS_SOFTCAP=scores.softcap is not None,
        PRECISION="ieee",
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **launch_options(device),
    )
    return split if total_splits > 1 else None


def num_own_splits(
    metadata: AttentionMetadata, scores: Scores, shape: LaunchShape, num_kv_heads: int
) -> int:
    """By the number of tiles of the longest text that there can be."""
    visible = metadata.max_seq_len
    if scores.window is not None:
        visible = min(visible, scores.window + shape.block_n)
    return choose_num_splits(
        metadata.num_decode_seqs * num_kv_heads,
        triton.cdiv(visible, shape.block_n),
        num_multiprocessors(metadata.seq_lens.device),
    )


def _num_prefix_splits(prefix: SharedPrefix, num_rows: int, num_kv_heads: int) -> int:
    """By the number of tiles if all rows share one prefix; more groups have more tiles."""
    num_tiles = triton.cdiv(num_rows, prefix.tile_rows.shape[1])
    num_programs = num_tiles * num_kv_heads
    return choose_num_splits(
        num_programs, _MAX_PREFIX_SPLITS, num_multiprocessors(prefix.lens.device)
    )


def _attend_to_prefix(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    prefix: SharedPrefix,
    scores: Scores,
    split: SplitAttention,
) -> None:
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = key_cache.shape
    num_tiles, rows = prefix.tile_rows.shape
    group = num_heads // num_kv_heads
    shape = decode_shape(query.dtype, head_dim, group)
    prefix_attention_kernel[(num_tiles, num_kv_heads, split.num_prefix_splits)](
        query,
        key_cache,
        value_cache,
        split.partial,
        split.lse,
        prefix.lens,
        prefix.tile_rows,
        metadata.block_tables,
        query.stride(0),
        metadata.block_tables.stride(0),
        scores.scale,
        scores.scale_out,
        split.partial.shape[2],
        STRIDE_Q_HEAD=query.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        PAGE_SIZE=page_size,
        ROWS=rows,
        BLOCK_M=max(16, triton.next_power_of_2(rows * group)),
        BLOCK_N=min(shape.block_n, page_size),
        HAS_SOFTCAP=scores.softcap is not None,
        PRECISION="ieee",
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **launch_options(query.device),
    )


def merge_splits(split: SplitAttention, output: Tensor) -> None:
    """Write the rows' attention, [num_rows, num_heads, head_dim], to the first rows of a tensor."""
    num_rows, num_heads, num_splits, head_dim = split.partial.shape
    merge_splits_kernel[(num_rows * num_heads,)](
        split.partial,
        split.lse,
        output,
        split.lse if split.prefix is None else split.prefix.lens,
        num_splits,
        split.num_prefix_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        HAS_PREFIX=split.prefix is not None,
        PADDED_SPLITS=_MAX_SPLITS if split.prefix is None else 2 * _MAX_SPLITS,
        num_warps=2,
        **launch_options(output.device),
    )


def padded_dim(head_dim: int) -> int:
    """A tile's width: a power of two, and at least what a matrix instruction takes."""
    return int(max(16, triton.next_power_of_2(head_dim)))
