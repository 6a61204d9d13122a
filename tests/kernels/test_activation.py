"""silu_and_mul and gelu_and_mul on Triton against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES: list[tuple[str, tuple[Any, ...]]] = [
    ("silu_and_mul", ()),
    ("gelu_and_mul", ("none",)),
    ("gelu_and_mul", ("tanh",)),
]


@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    size=st.sampled_from([1, 100, 1024, 1500]),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_gated_activations(
    random_tensor: Callable[..., Tensor],
    shape: list[int],
    size: int,
    name: tuple[str, tuple[Any, ...]],
    dtype: torch.dtype,
) -> None:
    from nbllm_kernels.gpu import activation

    x = random_tensor(*shape, 2 * size, dtype=dtype) * 4
    actual = getattr(activation, name[0])(x, *name[1])
    expected = getattr(reference, name[0])(x, *name[1])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_large_gates_do_not_overflow(
    device: torch.device, name: tuple[str, tuple[Any, ...]]
) -> None:
    from nbllm_kernels.gpu import activation

    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4], device=device)
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    actual = getattr(activation, name[0])(x, *name[1])
    torch.testing.assert_close(actual, getattr(reference, name[0])(x, *name[1]))


def test_wrong_arguments_are_refused(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.activation import gelu_and_mul, silu_and_mul

    with pytest.raises(ValueError, match="even"):
        silu_and_mul(random_tensor(2, 7))
    with pytest.raises(ValueError, match="approximate"):
        gelu_and_mul(random_tensor(2, 8), "erf")
    with pytest.raises(ValueError, match="stride 1"):
        silu_and_mul(random_tensor(8, 4).T)
