"""attention_projection: attention and its output projection, one op for what they share.

Where keys are split among programs, their merge can be part of the projection.
"""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.linear import Weight, linear
from nbllm_kernels.paged_attention import paged_attention


def attention_projection(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """paged_attention(...) W^T + b, added to a residual if there is one.

    Args:
        query, key_cache, value_cache, metadata: as in `paged_attention`, as are scale,
            sliding_window and softcap.
        weight: [out_features, num_heads * head_dim], plain or packed.
        bias: [out_features] or None.
        residual: [num_tokens, out_features] or None; may be overwritten.

    Returns:
        [num_tokens, out_features].
    """
    if isinstance(weight, Tensor) and runs_triton(query) and _is_one_decode(query, metadata):
        from nbllm_kernels.gpu import attention_projection as gpu
        from nbllm_kernels.gpu.decode_attention import Scores

        return gpu.attention_projection(
            query,
            key_cache,
            value_cache,
            metadata,
            weight,
            bias,
            scores=Scores.make(scale, sliding_window, softcap),
            residual=residual,
        )
    attended = paged_attention(
        query,
        key_cache,
        value_cache,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return linear(
        attended.flatten(-2),
        weight,
        bias,
        residual=residual,
        batch_invariant=metadata.batch_invariant,
    )


def _is_one_decode(query: Tensor, metadata: AttentionMetadata) -> bool:
    return (
        query.shape[0] == metadata.num_decode_seqs == 1
        and not metadata.batch_invariant
        and query.element_size() == 2
    )
