"""rotary on Triton against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# float32 may fuse a product and a sum; half precision rounds where PyTorch rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}


@given(
    num_tokens=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (3, 1), (14, 2)]),
    dims=st.sampled_from([(16, 16), (64, 64), (80, 32), (96, 96), (128, 64), (256, 256)]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rotation(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    num_tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    from nbllm_kernels.gpu.rotary import rotary

    head_dim, width = dims
    fused = random_tensor(num_tokens, sum(heads), head_dim, dtype=dtype)
    query, key = fused.split(heads, dim=1)
    cache = random_tensor(50, width, seed=1)
    positions = torch.arange(num_tokens, device=device) * 7 % 50
    actual = rotary(query, key, cache, positions)
    expected = reference.rotary(query, key, cache, positions)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_wrong_arguments_are_refused(
    random_tensor: Callable[..., Tensor], device: torch.device
) -> None:
    from nbllm_kernels.gpu.rotary import rotary

    query, key, cache = random_tensor(3, 4, 16), random_tensor(3, 2, 16), random_tensor(9, 16)
    positions = torch.arange(3, device=device)
    with pytest.raises(ValueError, match="positions must be"):
        rotary(query, key, cache, positions.int())
    with pytest.raises(ValueError, match="don't fit"):
        rotary(query, key[:2], cache, positions)
    with pytest.raises(ValueError, match="cos_sin_cache must be"):
        rotary(query, key, random_tensor(9, 32), positions)
    with pytest.raises(ValueError, match="cos_sin_cache must be"):
        rotary(query, key, cache.half(), positions)
