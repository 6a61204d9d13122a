"""The dense decoder: Llama, and everybody who differs from it by a few flags.

    hidden = embed(ids)
    for each layer:  hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))
    logits = head(norm(hidden))

Flags of `ModelConfig`: biases (Qwen 2), norms of q and k (Qwen 3, OLMo 2, Gemma 3), norms after
instead of or as well as before (OLMo 2; Gemma 2 and 3), sliding windows and rotary embeddings per
layer (Mistral, Gemma, SmolLM 3), soft-capped scores (Gemma 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from nbllm.config import ModelConfig
from nbllm.errors import ModelLoadError
from nbllm.models.causal_lm import CausalLM
from nbllm.models.layers import Embedding, LanguageModelHead, Linear
from nbllm.models.loading import load_parameters
from nbllm.models.rope import RotaryEmbedding
from nbllm.models.weights import CheckpointTensor
from nbllm_kernels import (
    AttentionMetadata,
    HeadNorm,
    attention_inputs,
    gelu_and_mul,
    norm_gated_linear,
    norm_linear,
    paged_attention,
    rms_norm,
    silu_and_mul,
)

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class RMSNorm(nn.Module):
    """See `nbllm_kernels.rms_norm`."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = config.rms_norm_eps
        self.offset = config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, weight_offset=self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return rms_norm(x, self.weight, self.eps, residual=residual, weight_offset=self.offset)

    def project(self, x: Tensor, linear: Linear) -> Tensor:
        """linear(norm(x)), see `nbllm_kernels.norm_linear`."""
        return norm_linear(
            x,
            self.weight,
            self.eps,
            linear.matrix,
            linear.bias,
            weight_offset=self.offset,
            batch_invariant=linear.batch_invariant,
        )


class Attention(nn.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int, batch_invariant: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window = config.layer_windows[layer]
        self.qk_norm = config.qk_norm
        self.qkv_proj = Linear(
            config.hidden_size,
            self.q_size + 2 * self.kv_size,
            config.attention_bias,
            batch_invariant=batch_invariant,
        )
        self.o_proj = Linear(
            self.q_size, config.hidden_size, config.output_bias, batch_invariant=batch_invariant
        )
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)
        elif config.qk_norm == "full":
            self.q_norm = RMSNorm(self.q_size, config)
            self.k_norm = RMSNorm(self.kv_size, config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attention of norm(x), added to a residual if there is one (which may be overwritten)."""
        qkv = self.qkv_proj(x) if norm is None else norm.project(x, self.qkv_proj)
        if self.qk_norm == "full":
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=-1)
        key_cache, value_cache = kv_cache
        q = attention_inputs(
            qkv, key_cache, value_cache, metadata, rope=rope, norm=self._head_norm()
        )
        attended = paged_attention(
            q,
            key_cache,
            value_cache,
            metadata,
            scale=self.scale,
            sliding_window=self.window,
            softcap=self.softcap,
        )
        return cast(Tensor, self.o_proj(attended.flatten(-2), residual))

    def _head_norm(self) -> HeadNorm | None:
        if self.qk_norm != "head":
            return None
        return HeadNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.offset)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, config: ModelConfig, batch_invariant: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            config.hidden_size,
            2 * config.intermediate_size,
            config.mlp_bias,
            batch_invariant=batch_invariant,
        )
        self.down_proj = Linear(
            config.intermediate_size,
            config.hidden_size,
            config.mlp_bias,
            batch_invariant=batch_invariant,
        )
        if config.hidden_act not in _ACTIVATIONS:
            raise ModelLoadError(f"config.json: hidden_act {config.hidden_act!r} is not supported")
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The MLP of norm(x), added to a residual if there is one (which may be overwritten)."""
        if norm is not None:
            inner = norm_gated_linear(
                x,
                norm.weight,
                norm.eps,
                self.gate_up_proj.matrix,
                self.gate_up_proj.bias,
                activation=self.activation,
                weight_offset=norm.offset,
                batch_invariant=self.gate_up_proj.batch_invariant,
            )
        elif self.activation == "silu":
            inner = silu_and_mul(self.gate_up_proj(x))
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            inner = gelu_and_mul(self.gate_up_proj(x), approximate)
        return cast(Tensor, self.down_proj(inner, residual))


class Layer(nn.Module):
    """Attention and MLP with their norms; where nothing comes between, the projections add their
    result to the residual stream themselves."""

    def __init__(self, config: ModelConfig, layer: int, batch_invariant: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, batch_invariant)
        self.mlp = MLP(config, batch_invariant)
        size = config.hidden_size
        self.placement = config.norm_placement
        self.post_attention_layernorm = RMSNorm(size, config)
        if self.placement != "post":
            self.input_layernorm = RMSNorm(size, config)
        if self.placement == "both":
            self.pre_feedforward_layernorm = RMSNorm(size, config)
        if self.placement != "pre":
            self.post_feedforward_layernorm = RMSNorm(size, config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """[num_tokens, hidden_size] to the same; may overwrite x."""
        if self.placement == "pre":
            norm = self.input_layernorm
            x = self.self_attn(x, rope, kv_cache, metadata, norm=norm, residual=x)
            return cast(Tensor, self.mlp(x, norm=self.post_attention_layernorm, residual=x))
        normed = x if self.placement == "post" else self.input_layernorm(x)
        attended = self.self_attn(normed, rope, kv_cache, metadata)
        attended = self.post_attention_layernorm(attended)
        if self.placement == "post":
            normed = x = x + attended
        else:
            normed, x = self.pre_feedforward_layernorm.add(attended, x)
        return x + cast(Tensor, self.post_feedforward_layernorm(self.mlp(normed)))


class Decoder(CausalLM):
    """A dense decoder-only language model; see the module's docstring.

    Args:
        config: the model's shape and flags.
        max_model_len: longest sequence; sizes the rotary tables.
        batch_invariant: see `nbllm_kernels.linear`.
    """

    def __init__(
        self, config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.max_model_len = max_model_len
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, layer, batch_invariant) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config)
        self.lm_head = LanguageModelHead(
            config.hidden_size,
            config.vocab_size,
            embedding=self.embed_tokens if config.tie_word_embeddings else None,
            softcap=config.final_softcap,
            batch_invariant=batch_invariant,
        )
        self._rotary: dict[int, RotaryEmbedding] = {}  # by the id of its configuration

    def prepare(self, device: torch.device) -> None:
        """Compute the rotary tables, one per kind that occurs."""
        self._rotary = {
            id(rope): RotaryEmbedding(rope, self.max_model_len, device)
            for rope in self.config.layer_ropes
            if rope is not None
        }

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """See `CausalLM.forward`."""
        hidden = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the dtype first, as transformers does.
            hidden = hidden * torch.tensor(self.config.embedding_scale).to(hidden)
        rows = {key: rotary.rows(positions, metadata) for key, rotary in self._rotary.items()}
        ropes = (rows.get(id(rope)) for rope in self.config.layer_ropes)
        for layer, rope, kv_cache in zip(self.layers, ropes, kv_caches, strict=True):
            hidden = layer(hidden, rope, kv_cache, metadata)
        return cast(Tensor, self.norm(hidden))

    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """Copy a checkpoint's tensors in, fusing q, k, v and gate, up on the way.

        Raises:
            ModelLoadError: tensors are missing, unexpected or of another shape.
        """
        config = self.config
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        inner = config.intermediate_size
        load_parameters(
            self,
            weights,
            strip_prefixes=("model.",),
            rename={"lm_head.": "lm_head.projection."},
            fused={
                "q_proj": ("qkv_proj", 0, q),
                "k_proj": ("qkv_proj", q, kv),
                "v_proj": ("qkv_proj", q + kv, kv),
                "gate_proj": ("gate_up_proj", 0, inner),
                "up_proj": ("gate_up_proj", inner, inner),
            },
            ignored=("rotary_emb.inv_freq",)
            + (("lm_head.",) if config.tie_word_embeddings else ()),
        )
