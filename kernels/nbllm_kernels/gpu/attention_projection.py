"""The output projection of one row, with the merge of attention's splits as its prologue.

Each program merges all splits for itself: they come from the L2 cache while its weights are on
their way, and a kernel between attention and projection is saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.gpu.decode_attention import (
    Scores,
    SplitAttention,
    decode_attention,
    merge_splits,
)
from nbllm_kernels.gpu.device import num_multiprocessors
from nbllm_kernels.gpu.paged_attention import check_attention
from nbllm_kernels.gpu.programmatic_launch import launch_options
from nbllm_kernels.gpu.skinny_kernels import load_tile
from nbllm_kernels.gpu.skinny_linear import (
    GemvShape,
    check_product,
    launch_shape,
    skinny_linear,
)

_MAX_PROGRAMS_PER_MULTIPROCESSOR = 2  # beyond, reading the splits again costs more than a kernel


@triton.jit
def _merge_splits(
    partial_ptr: tl.tensor,  # [NUM_HEADS, NUM_SPLITS, HEAD_DIM], each normalized
    lse_ptr: tl.tensor,  # [NUM_HEADS, NUM_SPLITS] float32, base 2
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
) -> tl.tensor:
    """[NUM_HEADS, HEAD_DIM] float32, see `merge_splits_kernel`."""
    head = tl.arange(0, NUM_HEADS)
    split = tl.arange(0, PADDED_SPLITS)
    lse = tl.load(
        lse_ptr + head[:, None] * NUM_SPLITS + split[None, :],
        mask=split[None, :] < NUM_SPLITS,
        other=float("-inf"),
    )
    highest = tl.max(lse, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(lse - shift[:, None]), axis=1)
    total = tl.where(total == 0.0, 1.0, total)
    source = partial_ptr + head[:, None] * (NUM_SPLITS * HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :]
    x = tl.zeros((NUM_HEADS, HEAD_DIM), dtype=tl.float32)
    for i in tl.static_range(NUM_SPLITS):
        weight = tl.exp2(tl.load(lse_ptr + head * NUM_SPLITS + i) - shift) / total
        x += weight[:, None] * tl.load(source + i * HEAD_DIM).to(tl.float32)
    return x


@triton.jit
def merge_gemv_kernel(
    partial_ptr: tl.tensor,  # [NUM_HEADS, NUM_SPLITS, HEAD_DIM]
    lse_ptr: tl.tensor,  # [NUM_HEADS, NUM_SPLITS] float32
    weight_ptr: tl.tensor,  # [OUT_FEATURES, NUM_HEADS * HEAD_DIM]
    bias_ptr: tl.tensor,  # [OUT_FEATURES], if HAS_BIAS
    out_ptr: tl.tensor,  # [OUT_FEATURES]; the residual if there is one
    stride_weight_row: tl.tensor,
    OUT_FEATURES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_K columns: all of them
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < OUT_FEATURES
    weight_row_ptr = weight_ptr + (rows.to(tl.int64) * stride_weight_row)[:, None, None]
    w = load_tile(weight_row_ptr, mask[:, None, None], 0, CHUNKS * BLOCK_K, CHUNKS, BLOCK_K)
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    if HAS_RESIDUAL:
        residual = tl.load(out_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    x = _merge_splits(partial_ptr, lse_ptr, NUM_HEADS, HEAD_DIM, NUM_SPLITS, PADDED_SPLITS)
    x = tl.reshape(x, (CHUNKS, BLOCK_K))
    y = tl.sum(tl.sum(w.to(tl.float32) * x[None, :, :], axis=1), axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += residual
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=mask)


def _merge_shape(split: SplitAttention, weight: Tensor) -> GemvShape | None:
    """Launch sizes, or None where merging in the projection is impossible or does not pay."""
    num_rows, num_heads, _, head_dim = split.partial.shape
    out_features, in_features = weight.shape
    count = num_multiprocessors(weight.device)
    shape = launch_shape(1, out_features, in_features, count)
    pays = (
        num_rows == 1
        and isinstance(shape, GemvShape)
        and num_heads & (num_heads - 1) == 0
        and head_dim & (head_dim - 1) == 0
        and shape.block_k * shape.chunks == in_features
        and triton.cdiv(out_features, shape.block_n) <= _MAX_PROGRAMS_PER_MULTIPROCESSOR * count
    )
    return shape if pays and isinstance(shape, GemvShape) else None


def attention_projection(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scores: Scores,
    residual: Tensor | None,
) -> Tensor:
    """See `nbllm_kernels.attention_projection`; for one decode row and a weight of two bytes.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    check_attention(query, key_cache, value_cache, metadata)
    check_product(query.flatten(-2), weight, bias, None, residual, "none")
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    split = decode_attention(query, key_cache, value_cache, metadata, scores, output)
    if split is not None:
        shape = _merge_shape(split, weight)
        if shape is not None:
            return _merge_gemv(split, weight, bias, residual, shape)
        merge_splits(split, output)
    return skinny_linear(output.flatten(-2), weight, bias, residual=residual)


def _merge_gemv(
    split: SplitAttention,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shape: GemvShape,
) -> Tensor:
    """residual + merged W^T + b, [1, out_features]; overwrites the residual."""
    _, num_heads, num_splits, head_dim = split.partial.shape
    out_features = weight.shape[0]
    out = residual
    if out is None:
        out = torch.empty((1, out_features), dtype=weight.dtype, device=weight.device)
    merge_gemv_kernel[(triton.cdiv(out_features, shape.block_n),)](
        split.partial,
        split.lse,
        weight,
        weight if bias is None else bias,
        out,
        weight.stride(0),
        OUT_FEATURES=out_features,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        NUM_SPLITS=num_splits,
        PADDED_SPLITS=triton.next_power_of_2(num_splits),
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        CHUNKS=shape.chunks,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=shape.num_warps,
        enable_fp_fusion=True,
        **launch_options(weight.device),
    )
    return out
