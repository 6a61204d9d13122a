"""rotary: one program per token and group of heads, query heads first, then key heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.validation import (
    describe,
    require,
    require_float,
    require_index,
    require_like,
)


@triton.jit
def _rotate_heads(
    x_ptr: tl.tensor,  # heads of one token
    out_ptr: tl.tensor,
    first_head: tl.tensor,
    cos: tl.tensor,  # [1, BLOCK_HALF] float32, rounded to the dtype
    sin: tl.tensor,
    NUM_HEADS: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < NUM_HEADS) & (dim < HALF)
    dtype = out_ptr.dtype.element_ty
    source, target = head * STRIDE_HEAD + dim, head * HEAD_DIM + dim
    first = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + source + HALF, mask=mask, other=0.0).to(tl.float32)
    # Every product is rounded to the dtype before the sum, as in PyTorch's operators.
    rotated = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    tl.store(out_ptr + target, rotated.to(dtype), mask=mask)
    rotated = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(out_ptr + target + HALF, rotated.to(dtype), mask=mask)
    if BLOCK_REST > 0:
        dim = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = (head < NUM_HEADS) & (dim < HEAD_DIM)
        rest = tl.load(x_ptr + head * STRIDE_HEAD + dim, mask=mask)
        tl.store(out_ptr + head * HEAD_DIM + dim, rest, mask=mask)


@triton.jit
def _rotary_kernel(
    query_ptr: tl.tensor,  # [num_tokens, num_heads, head_dim]
    key_ptr: tl.tensor,  # [num_tokens, num_kv_heads, head_dim]
    query_out_ptr: tl.tensor,  # contiguous
    key_out_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,  # [num_rows, 2 * half] float32
    positions_ptr: tl.tensor,  # [num_tokens] int64
    stride_query_token: tl.tensor,
    stride_key_token: tl.tensor,
    STRIDE_COS_SIN: tl.constexpr,
    STRIDE_QUERY_HEAD: tl.constexpr,
    STRIDE_KEY_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    num_query_groups = tl.cdiv(NUM_HEADS, BLOCK_HEADS)
    row = tl.load(positions_ptr + token) * STRIDE_COS_SIN
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    dtype = query_out_ptr.dtype.element_ty
    cos = tl.load(cos_sin_ptr + row + dim, mask=dim < HALF, other=0.0)
    sin = tl.load(cos_sin_ptr + row + HALF + dim, mask=dim < HALF, other=0.0)
    cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
    if group < num_query_groups:
        _rotate_heads(
            query_ptr + token * stride_query_token,
            query_out_ptr + token * (NUM_HEADS * HEAD_DIM),
            group * BLOCK_HEADS,
            cos,
            sin,
            NUM_HEADS,
            STRIDE_QUERY_HEAD,
            HEAD_DIM,
            HALF,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        _rotate_heads(
            key_ptr + token * stride_key_token,
            key_out_ptr + token * (NUM_KV_HEADS * HEAD_DIM),
            (group - num_query_groups) * BLOCK_HEADS,
            cos,
            sin,
            NUM_KV_HEADS,
            STRIDE_KEY_HEAD,
            HEAD_DIM,
            HALF,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )


def rotary(
    query: Tensor, key: Tensor, cos_sin_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """See `nbllm_kernels.rotary`.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    require_float("query", query, 3)
    require_float("key", key, 3)
    require_like("key", key, query)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    require(
        key.shape == (num_tokens, num_kv_heads, head_dim),
        lambda: f"query {describe(query)} and key {describe(key)} don't fit",
    )
    require_float("cos_sin_cache", cos_sin_cache, 2)
    width = cos_sin_cache.shape[1]
    require(
        cos_sin_cache.dtype == torch.float32
        and cos_sin_cache.device == query.device
        and width % 2 == 0
        and 0 < width <= head_dim,
        lambda: (
            f"cos_sin_cache must be [rows, at most {head_dim}] float32: {describe(cos_sin_cache)}"
        ),
    )
    require_index("positions", positions, (num_tokens,), torch.int64, query.device)
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if num_tokens == 0:
        return query_out, key_out
    block_half = triton.next_power_of_2(width // 2)
    rest = head_dim - width
    block_heads = max(1, min(triton.next_power_of_2(max(num_heads, 1)), 512 // block_half))
    grid = (
        num_tokens,
        triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads),
    )
    _rotary_kernel[grid](
        query,
        key,
        query_out,
        key_out,
        cos_sin_cache,
        positions,
        query.stride(0),
        key.stride(0),
        STRIDE_COS_SIN=cos_sin_cache.stride(0),
        STRIDE_QUERY_HEAD=query.stride(1),
        STRIDE_KEY_HEAD=key.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=width // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
        enable_fp_fusion=False,  # a fused product would not be rounded
    )
    return query_out, key_out
