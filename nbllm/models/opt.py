"""OPT (Zhang et al. 2022, arXiv:2205.01068).

    hidden = embed(ids) + position(ids)
    for each layer:  hidden += attention(norm(hidden));  hidden += fc2(act(fc1(norm(hidden))))
    logits = head(norm(hidden))

The 350m checkpoint differs: norms come after the sums (`do_layer_norm_before` is false), there is
no last norm, and the embeddings are narrower than the layers (`word_embed_proj_dim`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from nbllm.config import ModelConfig
from nbllm.models.causal_lm import CausalLM
from nbllm.models.classic import LayerNorm, SelfAttention, activate, check_classic_config
from nbllm.models.layers import Embedding, LanguageModelHead, Linear
from nbllm.models.loading import load_parameters
from nbllm.models.weights import CheckpointTensor
from nbllm_kernels import AttentionMetadata

_POSITION_OFFSET = 2  # the first two rows of the position table belong to padding
_EPS = 1e-5  # not in config.json


class Layer(nn.Module):
    """Attention and MLP with their norms, before or after."""

    def __init__(self, config: ModelConfig, batch_invariant: bool) -> None:
        super().__init__()
        raw, size = config.raw, config.hidden_size
        bias = bool(raw.get("enable_bias", True))
        is_affine = bool(raw.get("layer_norm_elementwise_affine", True))
        self.norms_first = bool(raw.get("do_layer_norm_before", True))
        self.activation = config.hidden_act
        self.self_attn = SelfAttention(
            config, scale=config.head_dim**-0.5, bias=bias, batch_invariant=batch_invariant
        )
        inner = config.intermediate_size
        self.self_attn_layer_norm = LayerNorm(size, _EPS, is_affine=is_affine)
        self.fc1 = Linear(size, inner, bias, batch_invariant=batch_invariant)
        self.fc2 = Linear(inner, size, bias, batch_invariant=batch_invariant)
        self.final_layer_norm = LayerNorm(size, _EPS, is_affine=is_affine)

    def forward(self, x: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        if self.norms_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), kv_cache, metadata)
            return x + self._mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, kv_cache, metadata))
        return cast(Tensor, self.final_layer_norm(x + self._mlp(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(activate(self.fc1(x), self.activation)))


class OPT(CausalLM):
    """See the module's docstring; arguments and errors as in `build_model`."""

    def __init__(
        self, config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        check_classic_config(config, max_model_len)
        raw, size = config.raw, config.hidden_size
        embedding_size = int(raw.get("word_embed_proj_dim") or size)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, embedding_size)
        self.embed_positions = Embedding(config.max_position_embeddings + _POSITION_OFFSET, size)
        self.project_in: Linear | None = None
        self.project_out: Linear | None = None
        if embedding_size != size:
            self.project_in = Linear(embedding_size, size, batch_invariant=batch_invariant)
            self.project_out = Linear(size, embedding_size, batch_invariant=batch_invariant)
        self.layers = nn.ModuleList(
            Layer(config, batch_invariant) for _ in range(config.num_layers)
        )
        self.final_layer_norm: LayerNorm | None = None
        # _remove_final_layer_norm marks checkpoints fine-tuned before the norm was known of.
        if raw.get("do_layer_norm_before", True) and not raw.get("_remove_final_layer_norm"):
            is_affine = bool(raw.get("layer_norm_elementwise_affine", True))
            self.final_layer_norm = LayerNorm(size, _EPS, is_affine=is_affine)
        self.lm_head = LanguageModelHead(
            embedding_size,
            config.vocab_size,
            embedding=self.embed_tokens if config.tie_word_embeddings else None,
            batch_invariant=batch_invariant,
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """See `CausalLM.forward`; the hidden states have the width of the embeddings."""
        x = self.embed_tokens(input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(positions + _POSITION_OFFSET)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, kv_cache, metadata)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return cast(Tensor, x)

    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """See `CausalLM.load_weights`; names with and without `model.` are known."""
        size = self.config.hidden_size
        load_parameters(
            self,
            weights,
            strip_prefixes=("model.", "decoder."),
            rename={"lm_head.": "lm_head.projection."},
            fused={
                "q_proj": ("qkv_proj", 0, size),
                "k_proj": ("qkv_proj", size, size),
                "v_proj": ("qkv_proj", 2 * size, size),
            },
            ignored=("lm_head.",) if self.config.tie_word_embeddings else (),
        )
