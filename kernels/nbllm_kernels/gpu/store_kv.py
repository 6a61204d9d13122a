"""store_kv: one program per token copies its heads into the token's slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.kv_dtype import to_cache
from nbllm_kernels.gpu.validation import describe, require, require_float, require_index


@triton.jit
def _store_kv_kernel(
    key_ptr: tl.tensor,  # [num_tokens, num_kv_heads, head_dim]
    value_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,  # [num_blocks, num_kv_heads, block_size, head_dim]
    value_cache_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,  # [num_tokens] int64
    stride_key_token: tl.tensor,
    stride_value_token: tl.tensor,
    STRIDE_KEY_HEAD: tl.constexpr,
    STRIDE_VALUE_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    mask = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)
    page = slot // PAGE_SIZE
    target = ((page * NUM_KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM + dim
    key_source = token * stride_key_token + head * STRIDE_KEY_HEAD + dim
    value_source = token * stride_value_token + head * STRIDE_VALUE_HEAD + dim
    dtype = key_cache_ptr.dtype.element_ty
    key = tl.load(key_ptr + key_source, mask=mask).to(tl.float32)
    tl.store(key_cache_ptr + target, to_cache(key, dtype), mask=mask)
    value = tl.load(value_ptr + value_source, mask=mask).to(tl.float32)
    tl.store(value_cache_ptr + target, to_cache(value, dtype), mask=mask)


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `nbllm_kernels.store_kv`.

    Slots past the end of the cache are undefined behaviour: checking them would wait for the
    device.

    Raises:
        ValueError: shapes, dtypes or strides don't fit.
    """
    require_float("key", key, 3)
    require_float("value", value, 3)
    require(
        key.shape == value.shape, lambda: f"key {list(key.shape)} but value {list(value.shape)}"
    )
    num_tokens, num_kv_heads, head_dim = key.shape
    check_cache(key_cache, value_cache, key)
    require(
        key_cache.shape[1] == num_kv_heads and key_cache.shape[3] == head_dim,
        lambda: f"key {describe(key)} does not fit the cache {describe(key_cache)}",
    )
    require_index("slot_mapping", slot_mapping, (num_tokens,), torch.int64, key.device)
    if num_tokens == 0:
        return
    padded_dim = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(num_kv_heads), max(1, 2048 // padded_dim))
    grid = (num_tokens, triton.cdiv(num_kv_heads, block_heads))
    _store_kv_kernel[grid](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        value.stride(0),
        STRIDE_KEY_HEAD=key.stride(1),
        STRIDE_VALUE_HEAD=value.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=key_cache.shape[2],
        BLOCK_HEADS=block_heads,
        PADDED_DIM=padded_dim,
        num_warps=4,
        enable_fp_fusion=True,
    )


def check_cache(key_cache: Tensor, value_cache: Tensor, like: Tensor) -> None:
    """Two contiguous [num_blocks, num_kv_heads, block_size, head_dim] of one shape and dtype: that
    of `like`, or float8_e4m3fn.

    Raises:
        ValueError: they are not.
    """
    _check_side("key_cache", key_cache, like)
    _check_side("value_cache", value_cache, like)
    require(
        key_cache.shape == value_cache.shape and key_cache.dtype == value_cache.dtype,
        lambda: "key_cache and value_cache differ in shape or dtype",
    )


def _check_side(name: str, cache: Tensor, like: Tensor) -> None:
    require(
        cache.dtype in (like.dtype, torch.float8_e4m3fn) and cache.device == like.device,
        lambda: (
            f"{name} must be {like.dtype} or float8_e4m3fn on {like.device}: {describe(cache)} "
            f"on {cache.device}"
        ),
    )
    require(cache.ndim == 4 and cache.is_contiguous(), lambda: f"{name}: {describe(cache)}")
