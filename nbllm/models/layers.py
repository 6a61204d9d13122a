"""The building blocks of the models: linear layers that pack, embeddings that may be tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbllm_kernels import (
    PackedWeight,
    SamplingTensors,
    Weight,
    linear,
    lm_head_sample,
    pack_weight,
    sample,
)


class Matrix(nn.Module):
    """A weight that products read; after `pack()` it may be in a layout of its own.

    Args:
        out_features, in_features: its shape.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self._packed: PackedWeight | None = None

    @property
    def matrix(self) -> Weight:
        """The weight as `nbllm_kernels.linear` takes it."""
        return self.weight if self._packed is None else self._packed

    def pack(self) -> None:
        """Trade the plain weight for a packed one, if that pays here."""
        packed = pack_weight(self.weight)
        if isinstance(packed, PackedWeight) and self._can_use(packed):
            self._packed = packed
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def _can_use(self, packed: PackedWeight) -> bool:
        return True


class Linear(Matrix):
    """y = x W^T + b.

    Args:
        in_features, out_features: of W [out_features, in_features].
        bias: whether there is a b.
        batch_invariant: see `nbllm_kernels.linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.batch_invariant = batch_invariant

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product, added to a residual if there is one (which may be overwritten)."""
        return linear(
            x,
            self.matrix,
            self.bias,
            residual=residual,
            batch_invariant=self.batch_invariant,
        )


class Embedding(Matrix):
    """Rows of a [vocab_size, hidden_size] table, which a head may share."""

    def _can_use(self, packed: PackedWeight) -> bool:
        return packed.has_rows

    def forward(self, ids: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.rows(ids)
        return F.embedding(ids, self.weight)


class LanguageModelHead(nn.Module):
    """Hidden states to logits, with a table of its own or the embedding's.

    Args:
        embedding: tie to this one, or None.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        embedding: Embedding | None,
        softcap: float | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.batch_invariant = batch_invariant
        self.projection: Linear | None = None
        self._tied = [embedding]  # in a list: not a submodule, its weight is counted once
        if embedding is None:
            self.projection = Linear(hidden_size, vocab_size, batch_invariant=batch_invariant)

    def pack(self) -> None:
        """Pack a shared table; one of its own is a linear layer like others."""
        embedding = self._tied[0]
        if embedding is not None:
            embedding.pack()

    @property
    def matrix(self) -> Weight:
        """The table, as `nbllm_kernels.linear` takes it."""
        table = self.projection or self._tied[0]
        assert table is not None
        return table.matrix

    def forward(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.matrix, batch_invariant=self.batch_invariant)
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits.float() / self.softcap)

    def sample(self, hidden: Tensor, params: SamplingTensors) -> Tensor:
        """[N] int64 token ids drawn from the logits of hidden states, see `lm_head_sample`."""
        if self.softcap is None and not self.batch_invariant:
            return lm_head_sample(hidden, self.matrix, params)
        return sample(self(hidden), params)


def pack_weights(model: nn.Module) -> None:
    """Pack the weights of every matrix product of a model, one after the other."""
    for module in model.modules():
        if isinstance(module, (Linear, LanguageModelHead)):
            module.pack()
