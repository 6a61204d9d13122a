"""matmul_batch_invariant on Triton against float64, and against itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@given(
    num_rows=st.sampled_from([0, 1, 5, 64, 70]),
    sizes=st.sampled_from([(16, 8), (100, 33), (128, 200), (96, 64)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    has_bias=st.booleans(),
)
def test_products(
    random_tensor: Callable[..., Tensor],
    num_rows: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    has_bias: bool,
) -> None:
    from nbllm_kernels.gpu.matmul import matmul_batch_invariant

    in_features, out_features = sizes
    x = random_tensor(num_rows, in_features, dtype=dtype)
    weight = random_tensor(out_features, in_features, dtype=dtype, seed=1)
    bias = random_tensor(out_features, dtype=dtype, seed=2) if has_bias else None
    actual = matmul_batch_invariant(x, weight, bias)
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(
    random_tensor: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    from nbllm_kernels.gpu.matmul import matmul_batch_invariant

    x = random_tensor(150, 200, dtype=dtype)
    weight = random_tensor(72, 200, dtype=dtype, seed=1)
    whole = matmul_batch_invariant(x, weight)
    for first, last in ((0, 1), (77, 78), (20, 140), (149, 150)):
        assert torch.equal(matmul_batch_invariant(x[first:last], weight), whole[first:last])


def test_wrong_arguments_are_refused(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.matmul import matmul_batch_invariant

    x, weight = random_tensor(2, 16), random_tensor(8, 16)
    with pytest.raises(ValueError, match="don't fit"):
        matmul_batch_invariant(x, weight[:, :8])
    with pytest.raises(ValueError, match="weight must be"):
        matmul_batch_invariant(x, weight.half())
    with pytest.raises(ValueError, match="bias must be"):
        matmul_batch_invariant(x, weight, random_tensor(9))
