"""attention_inputs: from the fused projection to what attention reads, in one go.

Norms of the heads of query and key (Qwen 3, Gemma 3), rotary embedding, and the write of key and
value into the cache touch the same few numbers one after the other: one op for the three of them
saves most of their time where there are few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nbllm_kernels import cpu_elementwise, cpu_native
from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.dispatch import runs_triton


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """An RMSNorm over each head.

    Attributes:
        query_weight, key_weight: [head_dim].
        eps, weight_offset: as in `rms_norm`.
    """

    query_weight: Tensor
    key_weight: Tensor
    eps: float
    weight_offset: float = 0.0


def attention_inputs(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    norm: HeadNorm | None = None,
) -> Tensor:
    """Norm and rotate query and key, store key and value.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], query, key and value heads
            side by side; may be overwritten.
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim], of the same dtype
            or float8_e4m3fn; written at `metadata.slot_mapping`.
        metadata: of the step.
        rope: table and positions, as `rotary` takes them; None does not rotate.
        norm: None does not norm.

    Returns:
        the query, [num_tokens, num_heads, head_dim].
    """
    if runs_triton(qkv):
        from nbllm_kernels.gpu import attention_inputs as gpu

        return gpu.attention_inputs(qkv, key_cache, value_cache, metadata, rope=rope, norm=norm)
    takes = cpu_native.takes_attention_inputs
    native = takes(qkv, key_cache, value_cache, metadata, rope, norm)
    cpu = cpu_native if native else cpu_elementwise
    return cpu.attention_inputs(qkv, key_cache, value_cache, metadata, rope=rope, norm=norm)
