"""The least time that a device could take for a workload: reading and computing, nothing else.

A step takes the longer of reading what it needs (weights once, the keys and values of every
sequence) and computing it (two operations for each weight and token, four for each pair of query
and key element). What all prompts begin with is computed and read once. Writing, sampling and the
host cost nothing here, so no engine reaches it. The rates of reading and computing are the
device's own, measured in the same run.

Source: the roofline model, Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nbllm.bench.workloads import Workload
from nbllm.config import ModelConfig
from nbllm.models import build_model
from nbllm.models.layers import Linear

_REPEATS = 10


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reaches.

    Attributes:
        bytes_per_s: of reading.
        flops_per_s: of the product of two large matrices in the model's dtype.
    """

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model's steps read and compute.

    Attributes:
        num_weights: of all matrix products but the head's.
        num_head_weights: of the head.
        num_heads, num_kv_heads, head_dim, num_layers: of the attention.
        bytes_per_number: of weights, keys and values.
    """

    num_weights: int
    num_head_weights: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    bytes_per_number: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> Costs:
        """Of a model in a dtype."""
        model = build_model(config, max_model_len=1)
        linears = [
            m for n, m in model.named_modules() if isinstance(m, Linear) and "lm_head" not in n
        ]
        return cls(
            num_weights=sum(linear.weight.numel() for linear in linears),
            num_head_weights=config.vocab_size * config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_layers=config.num_layers,
            bytes_per_number=dtype.itemsize,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        per_layer = 2 * self.num_kv_heads * self.head_dim
        return per_layer * self.num_layers * self.bytes_per_number

    def step_seconds(
        self,
        ceilings: Ceilings,
        *,
        num_tokens: int,
        num_sampled: int,
        num_pairs: int,
        num_read: int,
    ) -> float:
        """One step.

        Args:
            ceilings: the device's.
            num_tokens: that are computed.
            num_sampled: of them, with logits.
            num_pairs: of a query and a key that it sees.
            num_read: tokens whose keys and values are read.
        """
        weights = self.num_weights + self.num_head_weights
        num_bytes = weights * self.bytes_per_number + num_read * self.kv_bytes_per_token
        flops = 2 * (self.num_weights * num_tokens + self.num_head_weights * num_sampled)
        flops += 4 * num_pairs * self.num_heads * self.head_dim * self.num_layers
        return max(num_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)


def ideal_seconds(
    workload: Workload, costs: Costs, ceilings: Ceilings, *, max_num_seqs: int
) -> float:
    """The least time for a workload.

    Args:
        workload: what is run.
        costs: of the model.
        ceilings: of the device.
        max_num_seqs: rows that decode together; as many as that run as long as there are any.
    """
    lens = [len(prompt) for prompt in workload.prompts]
    shared = _num_shared(workload.prompts)
    num_pairs = shared * (shared + 1) // 2
    num_pairs += sum((n * (n + 1) - shared * (shared + 1)) // 2 for n in lens)
    num_tokens = shared + sum(n - shared for n in lens)
    # All prompts as one step: their pages are read by the products of attention, which count.
    seconds = costs.step_seconds(
        ceilings, num_tokens=num_tokens, num_sampled=len(lens), num_pairs=num_pairs, num_read=0
    )
    waiting = [(n, out - 1) for n, out in zip(lens, workload.output_lens, strict=True) if out > 1]
    waiting.reverse()
    running: list[tuple[int, int]] = []  # tokens so far, tokens to come
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            running.append(waiting.pop())
        own = sum(n + 1 - shared for n, _ in running)
        seconds += costs.step_seconds(
            ceilings,
            num_tokens=len(running),
            num_sampled=len(running),
            num_pairs=own + shared * len(running),
            num_read=own + shared,
        )
        running = [(n + 1, left - 1) for n, left in running if left > 1]
    return seconds


def _num_shared(prompts: list[list[int]]) -> int:
    """Tokens that all of several prompts begin with."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # all others lie between these two
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Read a large tensor, multiply two large matrices: the best of some tries of each."""
    on_gpu = device.type == "cuda"
    size = 4096 if on_gpu else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones((1 << 30 if on_gpu else 1 << 28) // 4, device=device)
    read_s = _best(lambda: source.sum(), device)
    multiply_s = _best(lambda: a @ a, device)
    return Ceilings(source.nbytes / read_s, 2 * size**3 / multiply_s)


def _best(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        _synchronize(device)
        begin = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
