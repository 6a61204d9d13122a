"""store_kv: write new keys and values into the pages of the KV cache."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels import reference
from nbllm_kernels.dispatch import runs_triton


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write each token into its slot.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim].
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], of the same dtype
            or float8_e4m3fn.
        slot_mapping: [num_tokens] int64, block_id * block_size + offset; negative is skipped.
    """
    if runs_triton(key):
        from nbllm_kernels.gpu import store_kv as gpu

        gpu.store_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    reference.store_kv(key, value, key_cache, value_cache, slot_mapping)
