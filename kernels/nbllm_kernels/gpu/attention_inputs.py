"""attention_inputs: norm, rotation and write into the cache in one kernel.

A program serves some heads of one token, all of the query, all of the key or all of the value.
The numbers stay in float32 from the load to the store: they are rounded once. The kernel is long
because it says thrice what `_transform_heads` is to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.gpu.kv_dtype import to_cache
from nbllm_kernels.gpu.programmatic_launch import launch_options
from nbllm_kernels.gpu.store_kv import check_cache
from nbllm_kernels.gpu.validation import (
    describe,
    require,
    require_float,
    require_index,
    require_like,
)

if TYPE_CHECKING:
    from nbllm_kernels.attention_inputs import HeadNorm

_TILE = 2048  # elements of a program, where there are enough tokens to fill the device
_FEW_TOKENS = 32  # up to which each head is a program of its own


@triton.jit
def _transform_heads(
    x_ptr: tl.tensor,  # the first head of the program
    out_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,  # [HEAD_DIM]
    cos: tl.tensor,  # [1, BLOCK_HALF] float32
    sin: tl.tensor,
    num_heads: tl.tensor,  # that exist from the first one on
    stride_out_head: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
) -> None:
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < num_heads) & (dim < HALF)
    first = tl.load(x_ptr + head * HEAD_DIM + dim, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head * HEAD_DIM + HALF + dim, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:
        rest_dim = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_mask = (head < num_heads) & (rest_dim < HEAD_DIM)
        rest = tl.load(x_ptr + head * HEAD_DIM + rest_dim, mask=rest_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        if BLOCK_REST > 0:
            square += tl.sum(rest * rest, axis=1, keep_dims=True)
        scale = 1.0 / tl.sqrt_rn(square / HEAD_DIM + eps)
        weight_ptr = norm_weight_ptr + dim
        weight = tl.load(weight_ptr, mask=dim < HALF, other=0.0).to(tl.float32)
        first = first * scale * (weight + weight_offset)
        weight = tl.load(weight_ptr + HALF, mask=dim < HALF, other=0.0).to(tl.float32)
        second = second * scale * (weight + weight_offset)
        if BLOCK_REST > 0:
            weight = tl.load(norm_weight_ptr + rest_dim, mask=rest_dim < HEAD_DIM, other=0.0)
            rest = rest * scale * (weight.to(tl.float32) + weight_offset)
    if HAS_ROPE:
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    dtype = out_ptr.dtype.element_ty
    target = out_ptr + head * stride_out_head
    tl.store(target + dim, to_cache(first, dtype), mask=mask)
    tl.store(target + HALF + dim, to_cache(second, dtype), mask=mask)
    if BLOCK_REST > 0:
        tl.store(target + rest_dim, to_cache(rest, dtype), mask=rest_mask)


@triton.jit
def attention_inputs_kernel(
    qkv_ptr: tl.tensor,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    query_ptr: tl.tensor,  # [num_tokens, NUM_HEADS, HEAD_DIM], contiguous
    key_cache_ptr: tl.tensor,  # [num_blocks, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM]
    value_cache_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,  # [num_tokens] int64
    cos_sin_ptr: tl.tensor,  # [num_rows, 2 * HALF] float32, if HAS_ROPE
    positions_ptr: tl.tensor,  # [num_tokens] int64, if HAS_ROPE
    query_norm_ptr: tl.tensor,  # [HEAD_DIM], if HAS_NORM
    key_norm_ptr: tl.tensor,
    stride_qkv_token: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    STRIDE_COS_SIN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    QUERY_GROUPS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    slot = tl.load(slot_mapping_ptr + token)
    cos = tl.zeros((1, BLOCK_HALF), dtype=tl.float32)
    sin = cos
    if HAS_ROPE:
        dim = tl.arange(0, BLOCK_HALF)[None, :]
        row_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * STRIDE_COS_SIN + dim
        cos = tl.load(row_ptr, mask=dim < HALF, other=0.0)
        sin = tl.load(row_ptr + HALF, mask=dim < HALF, other=0.0)
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_ptr = qkv_ptr + token * stride_qkv_token
    if group < QUERY_GROUPS:
        head = group * BLOCK_HEADS
        _transform_heads(
            x_ptr + head * HEAD_DIM,
            query_ptr + (token * NUM_HEADS + head) * HEAD_DIM,
            query_norm_ptr,
            cos,
            sin,
            NUM_HEADS - head,
            HEAD_DIM,
            eps,
            weight_offset,
            HEAD_DIM,
            HALF,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
            HAS_NORM,
            HAS_ROPE,
        )
    elif slot >= 0:
        is_key = group < QUERY_GROUPS + KV_GROUPS
        head = (group - QUERY_GROUPS) % KV_GROUPS * BLOCK_HEADS
        row = (slot // PAGE_SIZE * NUM_KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
        if is_key:
            _transform_heads(
                x_ptr + (NUM_HEADS + head) * HEAD_DIM,
                key_cache_ptr + row * HEAD_DIM,
                key_norm_ptr,
                cos,
                sin,
                NUM_KV_HEADS - head,
                PAGE_SIZE * HEAD_DIM,
                eps,
                weight_offset,
                HEAD_DIM,
                HALF,
                BLOCK_HEADS,
                BLOCK_HALF,
                BLOCK_REST,
                HAS_NORM,
                HAS_ROPE,
            )
        else:
            _transform_heads(
                x_ptr + (NUM_HEADS + NUM_KV_HEADS + head) * HEAD_DIM,
                value_cache_ptr + row * HEAD_DIM,
                key_norm_ptr,
                cos,
                sin,
                NUM_KV_HEADS - head,
                PAGE_SIZE * HEAD_DIM,
                eps,
                weight_offset,
                HEAD_DIM,
                HALF,
                BLOCK_HEADS,
                BLOCK_HALF,
                BLOCK_REST,
                False,
                False,
            )


def attention_inputs(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    norm: HeadNorm | None = None,
) -> Tensor:
    """See `nbllm_kernels.attention_inputs`.

    Slots past the end of the cache and positions past the table are undefined behaviour: checking
    them would wait for the device.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    num_heads = _check(qkv, key_cache, value_cache, metadata, rope, norm)
    num_tokens = qkv.shape[0]
    _, num_kv_heads, page_size, head_dim = key_cache.shape
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return query
    table, positions = (metadata.slot_mapping,) * 2 if rope is None else rope
    width = head_dim // 2 * 2 if rope is None else table.shape[1]
    rest = head_dim - width
    few = num_tokens <= _FEW_TOKENS
    block_heads = triton.next_power_of_2(num_heads)
    block_heads = 1 if few else min(block_heads, max(1, _TILE // triton.next_power_of_2(head_dim)))
    num_groups = triton.cdiv(num_heads, block_heads) + 2 * triton.cdiv(num_kv_heads, block_heads)
    attention_inputs_kernel[(num_tokens, num_groups)](
        qkv,
        query,
        key_cache,
        value_cache,
        metadata.slot_mapping,
        table,
        positions,
        qkv if norm is None else norm.query_weight,
        qkv if norm is None else norm.key_weight,
        qkv.stride(0),
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        STRIDE_COS_SIN=0 if rope is None else table.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=width // 2,
        PAGE_SIZE=page_size,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(max(width // 2, 1)),
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        HAS_NORM=norm is not None,
        HAS_ROPE=rope is not None,
        num_warps=1 if few else 4,
        **launch_options(qkv.device),
    )
    return query


def _check(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    rope: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
) -> int:
    """The number of query heads, if everything fits."""
    require_float("qkv", qkv, 2)
    check_cache(key_cache, value_cache, qkv)
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    num_heads = width // head_dim - 2 * num_kv_heads
    require(
        width % head_dim == 0 and num_heads > 0,
        lambda: f"qkv {describe(qkv)} does not fit the cache {describe(key_cache)}",
    )
    slots = metadata.slot_mapping
    require_index("slot_mapping", slots, (num_tokens,), torch.int64, qkv.device)
    if rope is not None:
        table, positions = rope
        require_float("the rotary table", table, 2)
        require(
            table.dtype == torch.float32
            and table.device == qkv.device
            and table.shape[1] % 2 == 0
            and 0 < table.shape[1] <= head_dim,
            lambda: (
                f"the rotary table must be [rows, at most {head_dim}] float32: {describe(table)}"
            ),
        )
        require_index("positions", positions, (num_tokens,), torch.int64, qkv.device)
    for weight in () if norm is None else (norm.query_weight, norm.key_weight):
        _check_weight(weight, qkv, head_dim)
    return num_heads


def _check_weight(weight: Tensor, qkv: Tensor, head_dim: int) -> None:
    require_like("norm weight", weight, qkv)
    require(
        weight.shape == (head_dim,) and weight.is_contiguous(),
        lambda: f"the norm's weights must be contiguous [{head_dim}]: {describe(weight)}",
    )
