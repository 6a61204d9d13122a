"""rms_norm on Triton against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# The mean is summed in another order: float32 differs in its last bits, half precision by at most
# one rounding, of a few elements.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = st.sampled_from(list(TOLERANCE))


def check_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.is_contiguous()
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 10)


@given(
    num_rows=st.integers(0, 6),
    hidden_size=st.sampled_from([1, 7, 64, 100, 896, 1024, 2560, 5000]),
    offset=st.sampled_from([0.0, 1.0]),
    dtype=DTYPES,
    has_residual=st.booleans(),
)
def test_rows(
    random_tensor: Callable[..., Tensor],
    num_rows: int,
    hidden_size: int,
    offset: float,
    dtype: torch.dtype,
    has_residual: bool,
) -> None:
    from nbllm_kernels.gpu.rms_norm import rms_norm

    x = random_tensor(num_rows, hidden_size, dtype=dtype)
    weight = random_tensor(hidden_size, dtype=dtype, seed=1)
    residual = random_tensor(num_rows, hidden_size, dtype=dtype, seed=2) if has_residual else None
    actual = rms_norm(x, weight, 1e-6, residual=residual, weight_offset=offset)
    expected = reference.rms_norm(x, weight, 1e-6, residual=residual, weight_offset=offset)
    if residual is None:
        check_equal(actual, expected)
    else:
        check_equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_heads_of_a_fused_projection(random_tensor: Callable[..., Tensor], head_dim: int) -> None:
    from nbllm_kernels.gpu.rms_norm import rms_norm

    fused = random_tensor(13, 8 * head_dim, dtype=torch.bfloat16)
    query = fused.split([5 * head_dim, 3 * head_dim], dim=-1)[0].unflatten(-1, (5, head_dim))
    weight = random_tensor(head_dim, dtype=torch.bfloat16)
    check_equal(rms_norm(query, weight, 1e-6), reference.rms_norm(query, weight, 1e-6))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_both_rounding_orders_are_kept(random_tensor: Callable[..., Tensor], offset: float) -> None:
    from nbllm_kernels.gpu.rms_norm import rms_norm

    x = random_tensor(8, 256, dtype=torch.bfloat16)
    weight = random_tensor(256, dtype=torch.bfloat16, seed=1)
    actual = rms_norm(x, weight, 1e-6, weight_offset=offset)
    expected = reference.rms_norm(x, weight, 1e-6, weight_offset=offset)
    # The wrong order changes about a third of all elements.
    assert (actual != expected).float().mean() < 0.01


def test_a_row_does_not_depend_on_the_others(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.rms_norm import rms_norm

    x, weight = random_tensor(9, 96), random_tensor(96, seed=1)
    whole = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-6)[0], whole[i]) for i in range(9))


def test_wrong_arguments_are_refused(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.rms_norm import rms_norm

    x, weight = random_tensor(4, 32), random_tensor(32)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        rms_norm(x, weight[:16], 1e-6)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(x, weight.half(), 1e-6)
    with pytest.raises(ValueError, match="stride 1"):
        rms_norm(x.T, random_tensor(4), 1e-6)
    with pytest.raises(ValueError, match="residual must be"):
        rms_norm(x, weight, 1e-6, residual=x[:2])
    with pytest.raises(ValueError, match="x must be float16"):
        rms_norm(x.double(), weight.double(), 1e-6)
