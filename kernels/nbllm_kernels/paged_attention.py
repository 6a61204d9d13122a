"""paged_attention: attention over a KV cache that lies in pages."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels import cpu_attention
from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.dispatch import runs_triton


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
    """Causal attention of each sequence's new tokens to all its tokens.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], of the same dtype
            or float8_e4m3fn.
        metadata: where the tokens stand.
        scale: factor of q k^T.
        sliding_window: a token sees this many tokens, itself included; None sees all.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.

    Returns:
        [num_tokens, num_heads, head_dim], in the query's dtype.
    """
    attend = cpu_attention.paged_attention
    if runs_triton(query):
        from nbllm_kernels.gpu import paged_attention as gpu

        attend = gpu.paged_attention
    return attend(
        query,
        key_cache,
        value_cache,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
