"""few_rows_attention: launch of the kernel that takes few decode rows from the projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.gpu.attention_inputs import check_inputs
from nbllm_kernels.gpu.decode_attention import (
    Scores,
    SplitAttention,
    decode_shape,
    merge_splits,
    num_own_splits,
    padded_dim,
)
from nbllm_kernels.gpu.device import num_multiprocessors
from nbllm_kernels.gpu.few_rows_attention_kernel import few_rows_attention_kernel
from nbllm_kernels.gpu.paged_attention import check_attention
from nbllm_kernels.gpu.programmatic_launch import launch_options

if TYPE_CHECKING:
    from nbllm_kernels.attention_inputs import HeadNorm

_PROGRAMS_PER_MULTIPROCESSOR = 2  # beyond that each row's query heads are done once, beforehand


def serves(qkv: Tensor, key_cache: Tensor, metadata: AttentionMetadata) -> bool:
    """True for a step of few decode rows in half precision that share nothing."""
    num_rows = metadata.num_decode_seqs
    return (
        num_rows == qkv.shape[0] == metadata.seq_lens.shape[0]
        and qkv.dtype != torch.float32
        and metadata.shared_prefix is None
        and not metadata.batch_invariant
        and num_rows * key_cache.shape[1]
        <= _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(qkv.device)
    )


def few_rows_attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    rope: tuple[Tensor, Tensor] | None = None,
    norm: HeadNorm | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See `nbllm_kernels.attention`; for steps that `serves` allows.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    num_heads = check_inputs(qkv, key_cache, value_cache, metadata, rope, norm)
    check_attention(num_heads, key_cache, metadata, sliding_window, softcap)
    num_rows, device = qkv.shape[0], qkv.device
    _, num_kv_heads, page_size, head_dim = key_cache.shape
    group = num_heads // num_kv_heads
    scores = Scores.make(scale, sliding_window, softcap)
    shape = decode_shape(qkv.dtype, head_dim, group)
    num_splits = num_own_splits(metadata, scores, shape, num_kv_heads)
    output = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=device)
    partial = lse = output
    if num_splits > 1:
        rows = (num_rows, num_heads, num_splits)
        partial = torch.empty((*rows, head_dim), dtype=qkv.dtype, device=device)
        lse = torch.empty(rows, dtype=torch.float32, device=device)
    table, positions = (metadata.slot_mapping,) * 2 if rope is None else rope
    few_rows_attention_kernel[(num_rows, num_kv_heads, num_splits)](
        qkv,
        key_cache,
        value_cache,
        partial,
        lse,
        metadata.seq_lens,
        metadata.block_tables,
        metadata.slot_mapping,
        table,
        positions,
        qkv if norm is None else norm.query_weight,
        qkv if norm is None else norm.key_weight,
        qkv.stride(0),
        metadata.block_tables.stride(0),
        scores.scale,
        scores.scale_out,
        sliding_window or 0,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        STRIDE_COS_SIN=0 if rope is None else table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        HALF=0 if rope is None else table.shape[1] // 2,
        PAGE_SIZE=page_size,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        NUM_SPLITS=num_splits,
        HAS_NORM=norm is not None,
        HAS_ROPE=rope is not None,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        PRECISION="ieee",
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **launch_options(device),
    )
    if num_splits > 1:
        merge_splits(SplitAttention(partial, lse, None, 0), output)
    return output
