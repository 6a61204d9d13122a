"""ModernBERT (Warner et al. 2024, arXiv:2412.13663).

    hidden = norm(embed(ids))
    for each layer:  hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))
    hidden = norm(hidden)

The first layer's attention has no norm of its own. Most layers see a window around each token, with
rotary embeddings of their own; the MLP is gated. The head that guesses tokens is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nbllm.config import ModelConfig, RopeConfig
from nbllm.errors import ModelLoadError
from nbllm.models.classic import LayerNorm
from nbllm.models.encoder import AttentionPlan, Encoder
from nbllm.models.layers import Embedding, Linear
from nbllm.models.loading import load_parameters
from nbllm.models.rope import RotaryEmbedding
from nbllm.models.weights import CheckpointTensor
from nbllm_kernels import gelu_and_mul, rotary

_ACTIVATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}


class Layer(nn.Module):
    """Attention and gated MLP with their norms before."""

    def __init__(self, config: ModelConfig, layer: int, eps: float, batch_invariant: bool) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        norm_bias = bool(config.raw.get("norm_bias", False))
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.approximate = _ACTIVATIONS[config.hidden_act]
        self.attn_norm = LayerNorm(size, eps, bias=norm_bias) if layer else None
        bias = config.attention_bias
        self.qkv_proj = Linear(size, 3 * size, bias, batch_invariant=batch_invariant)
        self.out_proj = Linear(size, size, bias, batch_invariant=batch_invariant)
        self.mlp_norm = LayerNorm(size, eps, bias=norm_bias)
        self.gate_up_proj = Linear(
            size, 2 * inner, config.mlp_bias, batch_invariant=batch_invariant
        )
        self.down_proj = Linear(inner, size, config.mlp_bias, batch_invariant=batch_invariant)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        normed = x if self.attn_norm is None else self.attn_norm(x)
        q, k, v = self.qkv_proj(normed).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        q, k = rotary(q, k, *rope)
        x = self.out_proj(plan.attend(q, k, v), x)
        gated = gelu_and_mul(self.gate_up_proj(self.mlp_norm(x)), self.approximate)
        return cast(Tensor, self.down_proj(gated, x))


class ModernBert(Encoder):
    """See the module's docstring; arguments and errors as in `build_model`."""

    def __init__(
        self, config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        if config.hidden_act not in _ACTIVATIONS:
            raise ModelLoadError(f"config.json: activation {config.hidden_act!r} is not supported")
        eps = float(config.raw.get("norm_eps", 1e-5))
        norm_bias = bool(config.raw.get("norm_bias", False))
        self.config = config
        self.max_model_len = max_model_len
        self.batch_invariant = batch_invariant
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = LayerNorm(config.hidden_size, eps, bias=norm_bias)
        self.layers = nn.ModuleList(
            Layer(config, layer, eps, batch_invariant) for layer in range(config.num_layers)
        )
        self.final_norm = LayerNorm(config.hidden_size, eps, bias=norm_bias)
        self._rotary: dict[int, RotaryEmbedding] = {}  # by the id of its configuration

    def prepare(self, device: torch.device) -> None:
        """Compute the rotary tables, one per kind that occurs."""
        self._rotary = {
            id(rope): RotaryEmbedding(rope, self.max_model_len, device) for rope in self._ropes
        }

    @property
    def _ropes(self) -> list[RopeConfig]:
        return [rope for rope in self.config.layer_ropes if rope is not None]

    def forward(self, input_ids: Tensor, positions: Tensor, text_lens: Sequence[int]) -> Tensor:
        """See `Encoder.forward`."""
        rows = {key: table.rows(positions) for key, table in self._rotary.items()}
        plans = {
            window: AttentionPlan(
                text_lens, input_ids.device, window=window, batch_invariant=self.batch_invariant
            )
            for window in set(self.config.layer_windows)
        }
        x = self.embedding_norm(self.tok_embeddings(input_ids))
        kinds = zip(self._ropes, self.config.layer_windows, strict=True)
        for layer, (rope, window) in zip(self.layers, kinds, strict=True):
            x = layer(x, rows[id(rope)], plans[window])
        return cast(Tensor, self.final_norm(x))

    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """See `Model.load_weights`; names with and without `model.` are known."""
        load_parameters(
            self,
            weights,
            strip_prefixes=("model.",),
            rename={
                "embeddings.norm.": "embedding_norm.",
                "embeddings.tok_": "tok_",
                ".attn.Wqkv.": ".qkv_proj.",
                ".attn.Wo.": ".out_proj.",
                ".mlp.Wi.": ".gate_up_proj.",
                ".mlp.Wo.": ".down_proj.",
            },
            ignored=("head.", "decoder."),
        )
