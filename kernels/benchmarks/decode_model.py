"""A decoder of random weights that decodes on the device alone: what bench_decode_layer measures.

`step` runs one token of each row: embedding, layers, head, the draw, and the advance of
positions and lengths, so that a captured graph of it can be replayed for a whole text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm_kernels import (
    AttentionMetadata,
    HeadNorm,
    SamplingTensors,
    attention_inputs,
    linear,
    lm_head_sample,
    norm_gated_linear,
    norm_linear,
    paged_attention,
    rms_norm,
    sample,
    silu_and_mul,
)

PAGE = 64
EPS = 1e-6


@dataclass(frozen=True)
class Spec:
    """Shapes of a model."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    has_head_norm: bool

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """[out_features, in_features] of the weights of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def layer_bytes(self) -> int:
        return 2 * sum(n * k for n, k in self.products.values())


SPECS = {
    spec.name: spec
    for spec in (
        Spec("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151_936, True),
        Spec("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128_256, False),
        Spec("llama-3.1-8b", 32, 4096, 14_336, 32, 8, 128, 128_256, False),
    )
}


@dataclass
class LayerWeights:
    """One layer's tensors."""

    input_norm: Tensor
    post_norm: Tensor
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    head_norm: HeadNorm | None
    kv_cache: Tensor  # [2, num_blocks, kv_heads, PAGE, head_dim]


class DecodeModel:
    """The model and the state of `num_rows` sequences of `context` tokens."""

    def __init__(self, spec: Spec, num_rows: int, context: int, num_layers: int) -> None:
        self.spec = spec
        self.context = context
        torch.manual_seed(0)
        pages_per_row = math.ceil((context + 256) / PAGE)
        shape = (2, num_rows * pages_per_row, spec.kv_heads, PAGE, spec.head_dim)
        self.embedding = self._random(spec.vocab, spec.hidden)
        self.head = self._random(spec.vocab, spec.hidden) / spec.hidden**0.5
        self.norm = self._norm_weight(spec.hidden)
        self.layers = [self._layer(shape) for _ in range(num_layers)]
        self.table = torch.randn(8192, spec.head_dim, device="cuda").sin()
        self.block_tables = torch.randperm(num_rows * pages_per_row, device="cuda").int()
        self.block_tables = self.block_tables.view(num_rows, pages_per_row)
        self.tokens = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
        self.positions = torch.zeros_like(self.tokens)
        self.slots = torch.zeros_like(self.tokens)
        self.seq_lens = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
        self.hidden = torch.empty(num_rows, spec.hidden, device="cuda", dtype=torch.bfloat16)
        self.metadata = AttentionMetadata(
            query_start_loc=torch.arange(num_rows + 1, device="cuda", dtype=torch.int32),
            seq_lens=self.seq_lens,
            block_tables=self.block_tables,
            slot_mapping=self.slots,
            max_query_len=1,
            max_seq_len=pages_per_row * PAGE,
            num_decode_seqs=num_rows,
        )
        ones = torch.ones(num_rows, device="cuda")
        self.sampling = SamplingTensors(
            temperature=0.8 * ones,
            top_k=torch.zeros(num_rows, dtype=torch.int32, device="cuda"),
            top_p=ones,
            min_p=0 * ones,
            seeds=torch.arange(num_rows, device="cuda"),
            positions=self.positions,
            all_greedy=False,
            any_filter=False,
        )
        self.reset()

    @staticmethod
    def _random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    @staticmethod
    def _norm_weight(size: int) -> Tensor:
        return (1 + torch.randn(size, device="cuda") / 8).bfloat16()

    def _layer(self, cache_shape: tuple[int, ...]) -> LayerWeights:
        spec = self.spec
        products = {name: self._random(n, k) / k**0.5 for name, (n, k) in spec.products.items()}
        head_norm = None
        if spec.has_head_norm:
            weights = [self._norm_weight(spec.head_dim) for _ in range(2)]
            head_norm = HeadNorm(weights[0], weights[1], EPS)
        return LayerWeights(
            self._norm_weight(spec.hidden),
            self._norm_weight(spec.hidden),
            **products,
            head_norm=head_norm,
            kv_cache=self._random(*cache_shape),
        )

    def reset(self) -> None:
        """Back to the first step; old keys and values stay, new ones are written again."""
        self.tokens.copy_(torch.arange(len(self.tokens), device="cuda") * 1009 % self.spec.vocab)
        self.positions.fill_(self.context - 1)
        self._place()

    def _place(self) -> None:
        """Length and slot of each row's position."""
        self.seq_lens.copy_(self.positions + 1)
        page = self.block_tables.gather(1, (self.positions // PAGE)[:, None])[:, 0]
        self.slots.copy_(page * PAGE + self.positions % PAGE)

    def step(self, *, fused: bool = True) -> None:
        """One token of each row."""
        hidden = self.embedding[self.tokens]
        for layer in self.layers:
            hidden = self.run_layer(layer, hidden, fused=fused)
        normed = rms_norm(hidden, self.norm, EPS)
        self.tokens.copy_(self.draw(normed, fused=fused))
        self.hidden.copy_(hidden)
        self.positions.add_(1)
        self._place()

    def draw(self, normed: Tensor, *, fused: bool) -> Tensor:
        """[num_rows] tokens of normed states; without `fused`, cuBLAS and stored logits."""
        if fused:
            return lm_head_sample(normed, self.head, self.sampling)
        return sample(F.linear(normed, self.head), self.sampling)

    def run_layer(self, layer: LayerWeights, x: Tensor, *, fused: bool) -> Tensor:
        """[num_rows, hidden] to the same; overwrites x. Without `fused`, cuBLAS and single ops."""
        if fused:
            qkv = norm_linear(x, layer.input_norm, EPS, layer.qkv)
        else:
            qkv = F.linear(rms_norm(x, layer.input_norm, EPS), layer.qkv)
        keys, values = layer.kv_cache
        rope = self.table, self.positions
        query = attention_inputs(qkv, keys, values, self.metadata, rope=rope, norm=layer.head_norm)
        scale = self.spec.head_dim**-0.5
        attended = paged_attention(query, keys, values, self.metadata, scale=scale).flatten(1)
        if fused:
            x = linear(attended, layer.o, residual=x)
            inner = norm_gated_linear(x, layer.post_norm, EPS, layer.gate_up)
            return linear(inner, layer.down, residual=x)
        x.addmm_(attended, layer.o.t())
        gate_up = F.linear(rms_norm(x, layer.post_norm, EPS), layer.gate_up)
        return x.addmm_(silu_and_mul(gate_up), layer.down.t())
