"""The building blocks of the models: linear layers that pack, embeddings that may be tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbllm_kernels import PackedWeight, Weight, linear, pack_weight


class Linear(nn.Module):
    """y = x W^T + b; after `pack()` the weight may be in a layout of its own.

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
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.batch_invariant = batch_invariant
        self._packed: PackedWeight | None = None

    @property
    def matrix(self) -> Weight:
        """The weight as `nbllm_kernels.linear` takes it."""
        return self.weight if self._packed is None else self._packed

    def pack(self) -> None:
        """Trade the plain weight for a packed one, if that pays here."""
        packed = pack_weight(self.weight)
        if isinstance(packed, PackedWeight):
            self._packed = packed
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product, added to a residual if there is one (which may be overwritten)."""
        return linear(
            x,
            self.matrix,
            self.bias,
            residual=residual,
            batch_invariant=self.batch_invariant,
        )


class Embedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self._packed: PackedWeight | None = None

    @property
    def table(self) -> Weight:
        """The table as `nbllm_kernels.linear` takes it."""
        return self.weight if self._packed is None else self._packed

    def pack(self) -> None:
        """Pack the table, if it can still be read row by row then: for a head that shares it."""
        packed = pack_weight(self.weight)
        if isinstance(packed, PackedWeight) and packed.has_rows:
            self._packed = packed
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

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

    def forward(self, hidden: Tensor) -> Tensor:
        if self.projection is not None:
            logits = self.projection(hidden)
        else:
            embedding = self._tied[0]
            assert embedding is not None
            logits = linear(hidden, embedding.table, batch_invariant=self.batch_invariant)
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits.float() / self.softcap)


def pack_weights(model: nn.Module) -> None:
    """Pack the weights of every matrix product of a model, one after the other."""
    for module in model.modules():
        if isinstance(module, (Linear, LanguageModelHead)):
            module.pack()
