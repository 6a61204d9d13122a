"""attention: from the fused projection of a layer to what its output projection takes."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels.attention_inputs import HeadNorm, attention_inputs
from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.paged_attention import paged_attention


def attention(
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
    """`attention_inputs`, then `paged_attention`; on a GPU one kernel for both if rows are few.

    Args:
        qkv, key_cache, value_cache, metadata, rope, norm: as in `attention_inputs`.
        scale, sliding_window, softcap: as in `paged_attention`.

    Returns:
        [num_tokens, num_heads, head_dim], in the dtype of `qkv`.
    """
    if runs_triton(qkv):
        from nbllm_kernels.gpu.few_rows_attention import few_rows_attention, serves

        if serves(qkv, key_cache, metadata):
            return few_rows_attention(
                qkv,
                key_cache,
                value_cache,
                metadata,
                rope=rope,
                norm=norm,
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
            )
    query = attention_inputs(qkv, key_cache, value_cache, metadata, rope=rope, norm=norm)
    return paged_attention(
        query,
        key_cache,
        value_cache,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
