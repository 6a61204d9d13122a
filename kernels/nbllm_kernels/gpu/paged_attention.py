"""paged_attention: launches of the attention kernels, by kind of row.

Decode rows (one new token) share a small tile with their group's heads; where they are too few to
fill the device, the keys of each are split among several programs and merged. Prompt chunks take
tiles of 64 rows or more, which is what Hopper's wgmma wants. In batch-invariant mode every row goes
the way of the prompt chunks, unsplit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nbllm_kernels.attention_metadata import (
    AttentionMetadata,
    SharedPrefix,
    rows_per_prefix_tile,
)
from nbllm_kernels.gpu.attention_kernel import merge_splits_kernel, paged_attention_kernel
from nbllm_kernels.gpu.prefix_attention_kernel import prefix_attention_kernel
from nbllm_kernels.gpu.store_kv import check_cache
from nbllm_kernels.gpu.validation import (
    describe,
    require,
    require_float,
    require_index,
    require_like,
)

_LOG2_E = 1.4426950408889634
_MAX_GROUP = 128
_MAX_SPLITS = 64
_MAX_PREFIX_SPLITS = 8


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """Tile and launch sizes of one variant of the kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def launch_shape(*, is_decode: bool, dtype: torch.dtype, head_dim: int, group: int) -> LaunchShape:
    """The fixed table: depends on the model alone, never on the batch."""
    padded_dim = _padded(head_dim)
    if dtype == torch.float32:
        # Products on the plain cores in full precision: small tiles, or registers spill.
        block_m = max(16, triton.next_power_of_2(group))
        return LaunchShape(block_m, 32 if padded_dim <= 128 else 16, 4, 2)
    if is_decode:
        block_m = max(16, triton.next_power_of_2(group))
        return LaunchShape(block_m, 64, 4, 3 if padded_dim <= 128 else 2)
    if padded_dim <= 64:
        return LaunchShape(128, 64, 4, 3)
    if padded_dim <= 128:
        return LaunchShape(128, 64, 8, 3)
    return LaunchShape(128, 64, 8, 2)


@dataclass(frozen=True, slots=True)
class _Scores:
    """How q k^T becomes scores in base 2."""

    scale: float
    scale_out: float
    window: int | None
    softcap: float | None


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
    if softcap is None:
        scores = _Scores(scale * _LOG2_E, 1.0, sliding_window, None)
    else:
        scores = _Scores(scale / softcap, softcap * _LOG2_E, sliding_window, softcap)
    num_seqs = metadata.seq_lens.shape[0]
    num_decodes = 0 if metadata.batch_invariant else metadata.num_decode_seqs
    if num_decodes:
        _launch_decodes(query, key_cache, value_cache, metadata, scores, output)
    if num_decodes < num_seqs:
        _launch_chunks(query, key_cache, value_cache, metadata, scores, output, num_decodes)
    return output


def choose_num_splits(num_programs: int, num_tiles: int, num_multiprocessors: int) -> int:
    """Programs among which the keys of a decode row are split.

    Enough for two programs per multiprocessor; one if there are enough rows.
    """
    wanted = triton.cdiv(2 * num_multiprocessors, max(num_programs, 1))
    if 2 * num_programs > num_multiprocessors:
        return 1
    return max(1, min(wanted, num_tiles, _MAX_SPLITS))


def _launch_decodes(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    scores: _Scores,
    output: Tensor,
) -> None:
    _, num_heads, head_dim = query.shape
    num_kv_heads, num_decodes = key_cache.shape[1], metadata.num_decode_seqs
    group = num_heads // num_kv_heads
    shape = launch_shape(is_decode=True, dtype=query.dtype, head_dim=head_dim, group=group)
    visible = metadata.max_seq_len
    if scores.window is not None:
        visible = min(visible, scores.window + shape.block_n)
    num_splits = choose_num_splits(
        num_decodes * num_kv_heads,
        triton.cdiv(visible, shape.block_n),
        _num_multiprocessors(query.device),
    )
    prefix = metadata.shared_prefix if scores.window is None else None
    num_prefix_splits = 0
    if prefix is not None:
        num_prefix_splits = choose_num_splits(
            triton.cdiv(num_decodes, prefix.tile_rows.shape[1]) * num_kv_heads,
            _MAX_PREFIX_SPLITS,
            _num_multiprocessors(query.device),
        )
    total_splits = num_splits + num_prefix_splits
    partial = maxima = sums = output
    if total_splits > 1:
        rows = (num_decodes, num_heads, total_splits)
        partial = torch.empty((*rows, head_dim), dtype=torch.float32, device=query.device)
        maxima = torch.empty(rows, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, dtype=torch.float32, device=query.device)
    tensors = (query, key_cache, value_cache, output, partial, maxima, sums)
    if prefix is not None:
        _launch_prefix(tensors, metadata, prefix, scores, num_prefix_splits, total_splits)
    _launch(
        (num_decodes, num_kv_heads, num_splits),
        tensors,
        metadata,
        scores,
        shape,
        first_seq=0,
        num_splits=num_splits,
        first_split=num_prefix_splits,
        total_splits=total_splits,
        prefix=prefix,
        is_decode=True,
    )
    if total_splits > 1:
        merge_splits_kernel[(num_decodes * num_heads,)](
            partial,
            maxima,
            sums,
            output,
            metadata.seq_lens if prefix is None else prefix.lens,
            total_splits,
            num_prefix_splits,
            NUM_HEADS=num_heads,
            HAS_PREFIX=prefix is not None,
            HEAD_DIM=head_dim,
            PADDED_DIM=_padded(head_dim),
            PADDED_SPLITS=triton.next_power_of_2(total_splits),
            num_warps=1 if head_dim <= 128 else 2,
        )


def _launch_prefix(
    tensors: tuple[Tensor, ...],
    metadata: AttentionMetadata,
    prefix: SharedPrefix,
    scores: _Scores,
    num_prefix_splits: int,
    total_splits: int,
) -> None:
    query, key_cache, value_cache, _, partial, maxima, sums = tensors
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = key_cache.shape
    num_tiles, rows = prefix.tile_rows.shape
    group = num_heads // num_kv_heads
    shape = launch_shape(is_decode=False, dtype=query.dtype, head_dim=head_dim, group=group)
    prefix_attention_kernel[(num_tiles, num_kv_heads, num_prefix_splits)](
        query,
        key_cache,
        value_cache,
        partial,
        maxima,
        sums,
        prefix.lens,
        prefix.tile_rows,
        metadata.block_tables,
        query.stride(0),
        metadata.block_tables.stride(0),
        scores.scale,
        scores.scale_out,
        num_prefix_splits,
        total_splits,
        STRIDE_Q_HEAD=query.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
        PAGE_SIZE=page_size,
        ROWS=rows,
        BLOCK_M=max(16, triton.next_power_of_2(rows * group)),
        BLOCK_N=min(shape.block_n, page_size),
        HAS_SOFTCAP=scores.softcap is not None,
        PRECISION="ieee",
        num_warps=4,
        num_stages=shape.num_stages,
    )


def _launch_chunks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    scores: _Scores,
    output: Tensor,
    first_seq: int,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, num_seqs = key_cache.shape[1], metadata.seq_lens.shape[0]
    group = num_heads // num_kv_heads
    shape = launch_shape(is_decode=False, dtype=query.dtype, head_dim=head_dim, group=group)
    num_blocks = (num_tokens - first_seq) // (shape.block_m // group) + num_seqs - first_seq
    _launch(
        (num_blocks, num_kv_heads, 1),
        (query, key_cache, value_cache, output, output, output, output),
        metadata,
        scores,
        shape,
        first_seq=first_seq,
        num_splits=1,
        first_split=0,
        total_splits=1,
        prefix=None,
        is_decode=False,
    )


def _launch(
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    metadata: AttentionMetadata,
    scores: _Scores,
    shape: LaunchShape,
    *,
    first_seq: int,
    num_splits: int,
    first_split: int,
    total_splits: int,
    prefix: SharedPrefix | None,
    is_decode: bool,
) -> None:
    query, key_cache = tensors[0], tensors[1]
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = key_cache.shape
    paged_attention_kernel[grid](
        *tensors,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_tables,
        metadata.seq_lens if prefix is None else prefix.lens,
        first_seq,
        metadata.seq_lens.shape[0] - first_seq,
        query.stride(0),
        metadata.block_tables.stride(0),
        scores.scale,
        scores.scale_out,
        scores.window or 0,
        num_splits,
        first_split,
        total_splits,
        STRIDE_Q_HEAD=query.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        IS_DECODE=is_decode,
        HAS_SPLITS=total_splits > 1,
        HAS_PREFIX=prefix is not None,
        HAS_WINDOW=scores.window is not None,
        HAS_SOFTCAP=scores.softcap is not None,
        PRECISION="ieee",
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def _padded(head_dim: int) -> int:
    """A tile's width: a power of two, and at least what a matrix instruction takes."""
    return int(max(16, triton.next_power_of_2(head_dim)))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 16  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


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
        key_cache.shape[3] == head_dim and num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        lambda: f"query {describe(query)} does not fit the cache {describe(key_cache)}",
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
    device = query.device
    shape = (num_seqs + 1,)
    require_index("query_start_loc", metadata.query_start_loc, shape, torch.int32, device)
    require_index("seq_lens", metadata.seq_lens, (num_seqs,), torch.int32, device)
    tables = metadata.block_tables
    require(
        tables.ndim == 2
        and tables.shape[0] == num_seqs
        and tables.dtype == torch.int32
        and tables.stride(1) == 1,
        lambda: f"block_tables must be [{num_seqs}, max_blocks] int32: {describe(tables)}",
    )
    require_like("block_tables", tables, metadata.seq_lens)
    require(
        tables.shape[1] * key_cache.shape[2] >= metadata.max_seq_len,
        lambda: (
            f"block_tables have {tables.shape[1]} pages of {key_cache.shape[2]} tokens, "
            f"and a sequence has {metadata.max_seq_len}"
        ),
    )
    prefix = metadata.shared_prefix
    if prefix is not None:
        require_index("shared_prefix.lens", prefix.lens, (num_seqs,), torch.int32, device)
        tiles = (prefix.tile_rows.shape[0], rows_per_prefix_tile(num_heads, num_kv_heads))
        require_index("shared_prefix.tile_rows", prefix.tile_rows, tiles, torch.int32, device)
    require(0 <= metadata.num_decode_seqs <= num_seqs, lambda: "num_decode_seqs is out of range")
