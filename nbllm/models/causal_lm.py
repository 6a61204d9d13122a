"""CausalLM: what the engine expects of every model that generates."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

from torch import Tensor

from nbllm.models.layers import LanguageModelHead
from nbllm.models.model import Model
from nbllm_kernels import AttentionMetadata


class CausalLM(Model):
    """A decoder-only language model over a paged KV cache.

    Steps take the `forward` of their tokens and `compute_logits` of some of them.
    """

    lm_head: LanguageModelHead

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
