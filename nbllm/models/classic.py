"""What OPT, GPT-2 and BERT have in common: learned positions, LayerNorm, plain multi-head
attention."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbllm.config import ModelConfig
from nbllm.errors import InvalidRequestError, ModelLoadError
from nbllm.models.layers import Linear
from nbllm_kernels import AttentionMetadata, paged_attention, store_kv


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450), with or without learned weight and bias."""

    def __init__(self, size: int, eps: float, *, is_affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.size = size
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if is_affine:
            self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
            if bias:
                self.bias = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Multi-head attention of one layer; positions are in the embeddings already.

    Args:
        config: the model's shape.
        scale: of the scores.
        bias: on all four projections.
        batch_invariant: see `nbllm_kernels.linear`.
    """

    def __init__(
        self, config: ModelConfig, *, scale: float, bias: bool, batch_invariant: bool
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.scale = scale
        self.qkv_proj = Linear(size, 3 * size, bias, batch_invariant=batch_invariant)
        self.out_proj = Linear(size, size, bias, batch_invariant=batch_invariant)

    def forward(self, x: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        key_cache, value_cache = kv_cache
        store_kv(k, v, key_cache, value_cache, metadata.slot_mapping)
        attended = paged_attention(q, key_cache, value_cache, metadata, scale=self.scale)
        return cast(Tensor, self.out_proj(attended.flatten(-2)))


def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation under the name that config.json has for it."""
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if name == "gelu" else "tanh")


def check_classic_config(config: ModelConfig, max_model_len: int) -> None:
    """Refuse what this structure can't do.

    Raises:
        ModelLoadError: heads that don't divide the hidden size, or an unknown activation.
        InvalidRequestError: `max_model_len` is more than there are learned positions.
    """
    if config.num_heads * config.head_dim != config.hidden_size:
        raise ModelLoadError(
            f"config.json: {config.num_heads} heads don't divide hidden_size {config.hidden_size}"
        )
    # The three names of the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    if config.hidden_act not in ("relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        raise ModelLoadError(f"config.json: activation {config.hidden_act!r} is not supported")
    num_positions = config.max_position_embeddings - config.position_offset
    if max_model_len > num_positions:
        raise InvalidRequestError(
            f"max_model_len={max_model_len}, but {config.architecture} has learned positions for "
            f"{num_positions} tokens only: lower max_model_len",
            parameter="max_model_len",
        )
