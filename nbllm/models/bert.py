"""BERT (Devlin et al. 2018, arXiv:1810.04805), and RoBERTa and XLM-RoBERTa, which differ from it in
names and in where their positions begin.

    hidden = norm(embed(ids) + position(ids) + type(0))
    for each layer:  hidden = norm(hidden + attention(hidden))
                     hidden = norm(hidden + fc2(act(fc1(hidden))))

All tokens are of the first type: a prompt is one text. What was there for training (the pooler, the
heads that guess tokens and sentences) is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from nbllm.config import ModelConfig
from nbllm.models.classic import LayerNorm, activate, check_classic_config
from nbllm.models.encoder import AttentionPlan, Encoder
from nbllm.models.layers import Embedding, Linear
from nbllm.models.loading import load_parameters
from nbllm.models.weights import CheckpointTensor


class Layer(nn.Module):
    """Attention and MLP, each with a norm of the sum behind it."""

    def __init__(self, config: ModelConfig, eps: float, batch_invariant: bool) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.activation = config.hidden_act
        self.qkv_proj = Linear(size, 3 * size, True, batch_invariant=batch_invariant)
        self.out_proj = Linear(size, size, True, batch_invariant=batch_invariant)
        self.attention_norm = LayerNorm(size, eps)
        self.fc1 = Linear(size, inner, True, batch_invariant=batch_invariant)
        self.fc2 = Linear(inner, size, True, batch_invariant=batch_invariant)
        self.final_norm = LayerNorm(size, eps)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        x = self.attention_norm(self.out_proj(plan.attend(q, k, v), x))
        return cast(Tensor, self.final_norm(self.fc2(activate(self.fc1(x), self.activation), x)))


class Bert(Encoder):
    """See the module's docstring; arguments and errors as in `build_model`."""

    def __init__(
        self, config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False
    ) -> None:
        super().__init__()
        check_classic_config(config, max_model_len)
        raw, size = config.raw, config.hidden_size
        eps = float(raw.get("layer_norm_eps", 1e-12))
        self.config = config
        self.batch_invariant = batch_invariant
        self.word_embeddings = Embedding(config.vocab_size, size)
        self.position_embeddings = Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = Embedding(int(raw.get("type_vocab_size", 2)), size)
        self.embedding_norm = LayerNorm(size, eps)
        self.layers = nn.ModuleList(
            Layer(config, eps, batch_invariant) for _ in range(config.num_layers)
        )

    def forward(self, input_ids: Tensor, positions: Tensor, text_lens: Sequence[int]) -> Tensor:
        """See `Encoder.forward`."""
        plan = AttentionPlan(text_lens, input_ids.device, batch_invariant=self.batch_invariant)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings(positions + self.config.position_offset)
        x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x, plan)
        return cast(Tensor, x)

    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """See `Model.load_weights`; names with and without `bert.` or `roberta.` are known."""
        size = self.config.hidden_size
        load_parameters(
            self,
            weights,
            strip_prefixes=("bert.", "roberta."),
            rename={
                ".gamma": ".weight",  # as the first checkpoints, converted from TensorFlow, have it
                ".beta": ".bias",
                "embeddings.LayerNorm.": "embedding_norm.",
                "embeddings.word_": "word_",
                "embeddings.position_": "position_",
                "embeddings.token_type_": "token_type_",
                "encoder.layer.": "layers.",
                ".attention.self.": ".",
                ".attention.output.dense.": ".out_proj.",
                ".attention.output.LayerNorm.": ".attention_norm.",
                ".intermediate.dense.": ".fc1.",
                ".output.dense.": ".fc2.",
                ".output.LayerNorm.": ".final_norm.",
            },
            fused={
                "query": ("qkv_proj", 0, size),
                "key": ("qkv_proj", size, size),
                "value": ("qkv_proj", 2 * size, size),
            },
            # Two tables of numbers from 0 on, or of zeros, which old checkpoints hold as buffers.
            ignored=("pooler.", "cls.", "lm_head.", ".position_ids", ".token_type_ids"),
        )
