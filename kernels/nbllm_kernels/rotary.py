"""rotary: rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels import reference
from nbllm_kernels.dispatch import runs_triton


def rotary(
    query: Tensor, key: Tensor, cos_sin_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate query and key by the angles of their positions.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key: [num_tokens, num_kv_heads, head_dim].
        cos_sin_cache: [max_position, 2 * half] float32, cosines then sines; dimensions i and
            i + half form a pair, those from 2 * half on stay as they are.
        positions: [num_tokens] int64.

    Returns:
        rotated query and key, new tensors.
    """
    if runs_triton(query):
        from nbllm_kernels.gpu import rotary as gpu

        return gpu.rotary(query, key, cos_sin_cache, positions)
    return reference.rotary(query, key, cos_sin_cache, positions)
