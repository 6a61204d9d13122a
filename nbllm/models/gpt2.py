"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    hidden = wte(ids) + wpe(positions)
    for each layer:  hidden += attn(ln_1(hidden));  hidden += c_proj(gelu(c_fc(ln_2(hidden))))
    logits = head(ln_f(hidden))

Checkpoints store the linear layers as [in, out].
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


class MLP(nn.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(self, config: ModelConfig, batch_invariant: bool) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.c_fc = Linear(size, inner, True, batch_invariant=batch_invariant)
        self.c_proj = Linear(inner, size, True, batch_invariant=batch_invariant)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.c_proj(activate(self.c_fc(x), self.activation)))


class Layer(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, config: ModelConfig, layer: int, batch_invariant: bool) -> None:
        super().__init__()
        raw = config.raw
        eps = float(raw.get("layer_norm_epsilon", 1e-5))
        scale = config.head_dim**-0.5 if raw.get("scale_attn_weights", True) else 1.0
        if raw.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        self.ln_1 = LayerNorm(config.hidden_size, eps)
        self.attn = SelfAttention(config, scale=scale, bias=True, batch_invariant=batch_invariant)
        self.ln_2 = LayerNorm(config.hidden_size, eps)
        self.mlp = MLP(config, batch_invariant)

    def forward(self, x: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        x = x + self.attn(self.ln_1(x), kv_cache, metadata)
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class GPT2(CausalLM):
    """See the module's docstring; arguments and errors as in `build_model`."""

    def __init__(
        self, config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        check_classic_config(config, max_model_len)
        size = config.hidden_size
        self.config = config
        self.wte = Embedding(config.vocab_size, size)
        self.wpe = Embedding(config.max_position_embeddings, size)
        self.h = nn.ModuleList(
            Layer(config, layer, batch_invariant) for layer in range(config.num_layers)
        )
        self.ln_f = LayerNorm(size, float(config.raw.get("layer_norm_epsilon", 1e-5)))
        self.lm_head = LanguageModelHead(
            size,
            config.vocab_size,
            embedding=self.wte if config.tie_word_embeddings else None,
            batch_invariant=batch_invariant,
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """See `CausalLM.forward`."""
        x = self.wte(input_ids) + self.wpe(positions)
        for layer, kv_cache in zip(self.h, kv_caches, strict=True):
            x = layer(x, kv_cache, metadata)
        return cast(Tensor, self.ln_f(x))

    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """See `CausalLM.load_weights`; names with and without `transformer.` are known."""
        load_parameters(
            self,
            weights,
            strip_prefixes=("transformer.",),
            rename={
                "lm_head.": "lm_head.projection.",
                ".attn.c_attn.": ".attn.qkv_proj.",
                ".attn.c_proj.": ".attn.out_proj.",
            },
            # `attn.bias` is the causal mask: old checkpoints hold it as a buffer.
            ignored=(".attn.bias", ".attn.masked_bias")
            + (("lm_head.",) if self.config.tie_word_embeddings else ()),
            transposed=(
                "attn.qkv_proj.weight",
                "attn.out_proj.weight",
                "mlp.c_fc.weight",
                "mlp.c_proj.weight",
            ),
        )
