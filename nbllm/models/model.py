"""Model: what loading expects of every model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from nbllm.models.weights import CheckpointTensor


class Model(nn.Module):
    """A model that the engine runs, see `CausalLM` and `Encoder`.

    Its life: built on the meta device, given memory, `prepare`, `load_weights`, then `forward` once
    per step. It holds no state of requests.
    """

    def prepare(self, device: torch.device) -> None:
        """Compute tables that no checkpoint holds; most models need none."""

    @abstractmethod
    def load_weights(self, weights: Iterable[CheckpointTensor]) -> None:
        """Copy a checkpoint's tensors in, fusing what the model computes in one product.

        Raises:
            ModelLoadError: tensors are missing, unexpected, of another shape or not finite.
        """
