"""CausalLM: what the engine expects of every model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from nbllm.models.layers import LanguageModelHead
from nbllm.models.weights import CheckpointTensor
from nbllm_kernels import AttentionMetadata


class CausalLM(nn.Module):
    """A decoder-only language model over a paged KV cache.

    Its life: built on the meta device, given memory, `prepare`, `load_weights`, then `forward` and
    `compute_logits` once per step. It holds no state of requests.
    """

    lm_head: LanguageModelHead

    def prepare(self, device: torch.device) -> None:
        """Compute tables that no checkpoint holds; most models need none."""

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Hidden states, [num_tokens, hidden_size], of the new tokens.

        Args:
            input_ids, positions: [num_tokens] int64.
            kv_caches: per layer [2, num_blocks, num_kv_heads, block_size, head_dim]; written.
            metadata: where the tokens stand.
        """

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, vocab_size] float32 logits of hidden states [N, hidden_size]."""
        return cast(Tensor, self.lm_head(hidden))

    @abstractmethod
    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """Copy a checkpoint's tensors in, fusing what the model computes in one product.

        Raises:
            ModelLoadError: tensors are missing, unexpected, of another shape or not finite.
        """
