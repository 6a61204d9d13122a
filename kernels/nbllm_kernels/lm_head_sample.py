"""lm_head_sample: from hidden states to tokens, without the logits in between for few rows."""

from __future__ import annotations

from torch import Tensor

from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.linear import Weight, linear
from nbllm_kernels.sampling import sample
from nbllm_kernels.sampling_tensors import SamplingTensors


def lm_head_sample(hidden: Tensor, weight: Weight, params: SamplingTensors) -> Tensor:
    """sample(hidden W^T, params): the same tokens, up to the rounding of the products.

    Args:
        hidden: [N, hidden_size], normed.
        weight: [vocab_size, hidden_size], plain or packed.
        params: one entry per row.

    Returns:
        [N] int64; -1 as in `sample`.
    """
    has_filter = params.any_filter and not params.all_greedy
    if isinstance(weight, Tensor) and not has_filter and runs_triton(hidden):
        from nbllm_kernels.gpu import lm_head_sample as gpu
        from nbllm_kernels.gpu.skinny_linear import can_multiply

        if can_multiply(hidden, weight):
            return gpu.lm_head_sample(hidden, weight, params)
    return sample(linear(hidden, weight), params)
