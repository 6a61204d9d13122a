"""The small ops between the matrix products on the CPU, in as few operators as PyTorch has: for
what `cpu_native` does not take.

At one row an operator costs its call, one or two microseconds, whatever it computes; a model has
thousands of them. So query and key heads are normed and rotated as one tensor, in float32 and in
place, and what depends on the step alone is made once and shared by its layers.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.reference import raw_numbers, to_cache

if TYPE_CHECKING:
    from nbllm_kernels.attention_inputs import HeadNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """See `nbllm_kernels.rms_norm`; the product with the weight is not rounded in between."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = _inverse_rms(wide, eps)
    normed = wide.mul_(scale) if wide is not x else wide * scale
    return normed.mul_(_wide_weight(weight, weight_offset, normed.dtype)).to(x.dtype)


def attention_inputs(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    rope: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
) -> Tensor:
    """See `nbllm_kernels.attention_inputs`."""
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, head_dim))
    qk = heads[:, :-num_kv_heads]
    num_heads = qk.shape[1] - num_kv_heads
    if norm is not None or rope is not None:
        wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
        if norm is not None:
            wide.mul_(_inverse_rms(wide, norm.eps)).mul_(_head_weights(norm, num_heads, wide))
        if rope is not None:
            wide = _rotate(wide, _rope_rows(metadata.scratch, *rope, wide.dtype))
        qk = wide.to(qkv.dtype)
    slots = _kept_slots(metadata, key_cache)
    for source, cache in ((qk[:, num_heads:], key_cache), (heads[:, -num_kv_heads:], value_cache)):
        if slots.tokens is not None:
            source = source[slots.tokens]
        numbers = raw_numbers(to_cache(source.reshape(-1, head_dim), cache.dtype))
        raw_numbers(cache).view(-1, head_dim).index_copy_(0, slots.rows, numbers)
    return qk[:, :num_heads]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _wide_weight(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    return weight if offset == 0.0 else weight.to(dtype) + offset


def _head_weights(norm: HeadNorm, num_heads: int, like: Tensor) -> Tensor:
    """[num_heads + num_kv_heads, head_dim]: the query's weight for the first, then the key's."""
    num_kv_heads = like.shape[1] - num_heads
    query, key = (
        _wide_weight(weight, norm.weight_offset, like.dtype)
        for weight in (norm.query_weight, norm.key_weight)
    )
    return torch.cat([query.expand(num_heads, -1), key.expand(num_kv_heads, -1)])


class _RopeRows(NamedTuple):
    """[num_tokens, 1, rotary_dim] each, for x * cos + swapped(x) * sin: the sine of the first half
    is negated."""

    cos: Tensor
    sin: Tensor


def _rope_rows(
    scratch: dict[Hashable, Any], table: Tensor, positions: Tensor, dtype: torch.dtype
) -> _RopeRows:
    key = ("rope", id(table), dtype)
    if key not in scratch:
        cos, sin = table[positions].to(dtype)[:, None].chunk(2, dim=-1)
        scratch[key] = _RopeRows(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
    rows: _RopeRows = scratch[key]
    return rows


def _rotate(x: Tensor, rows: _RopeRows) -> Tensor:
    """Rotate the first dimensions of each head; may overwrite x."""
    rotary_dim = rows.cos.shape[-1]
    part = x[..., :rotary_dim]
    swapped = part.roll(rotary_dim // 2, dims=-1)
    part.mul_(rows.cos).addcmul_(swapped, rows.sin)
    return x


class _Slots(NamedTuple):
    """Where the tokens of a step go.

    Attributes:
        tokens: those that are stored, or None if all are.
        rows: [stored tokens * num_kv_heads], of the cache, seen as [rows, head_dim].
    """

    tokens: Tensor | None
    rows: Tensor


def _kept_slots(metadata: AttentionMetadata, cache: Tensor) -> _Slots:
    _, num_kv_heads, block_size, _ = cache.shape
    key = ("slots", num_kv_heads, block_size)
    if key not in metadata.scratch:
        slots = metadata.slot_mapping
        tokens = None
        if bool((slots < 0).any()):
            tokens = torch.nonzero(slots >= 0)[:, 0]
            slots = slots[tokens]
        pages = torch.div(slots, block_size, rounding_mode="floor")
        heads = pages[:, None] * num_kv_heads + torch.arange(num_kv_heads)
        index = heads * block_size + (slots % block_size)[:, None]
        metadata.scratch[key] = _Slots(tokens, index.flatten())
    kept: _Slots = metadata.scratch[key]
    return kept
