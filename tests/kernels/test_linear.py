"""linear: products of few rows and of packed weights, and a packed table can still be read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nbllm_kernels import linear
from nbllm_kernels.linear import PackedWeight, can_pack

pytestmark = pytest.mark.usefixtures("implementation")

BF16 = torch.bfloat16
packs = pytest.mark.skipif(not can_pack(torch.empty(1, dtype=BF16)), reason="no bfloat16 here")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    num_rows=st.integers(0, 20),
    in_features=st.sampled_from([16, 100, 256, 640]),
    out_features=st.sampled_from([1, 2, 3, 5, 64, 333]),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
    dtype=st.sampled_from([torch.float32, BF16]),
)
def test_a_product_is_that_of_float64(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    has_residual: bool,
    dtype: torch.dtype,
) -> None:
    x = random(num_rows, in_features, dtype=dtype)
    weight = random(out_features, in_features, seed=1, dtype=dtype)
    bias = random(out_features, seed=2, dtype=dtype) if has_bias else None
    residual = random(num_rows, out_features, seed=3, dtype=dtype) if has_residual else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if residual is not None:
        expected += residual.double()
    actual = linear(x, weight, bias, residual=residual)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = random(2, 32, dtype=torch.float32), random(8, 48, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="shape"):
        linear(x, weight)
    with pytest.raises(RuntimeError, match="size"):
        linear(x, weight[:, :32].contiguous(), random(9, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_product_of_few_rows_does_not_depend_on_the_others(
    implementation: str, dtype: torch.dtype
) -> None:
    """Bit for bit: whoever is beside a row, however many threads there are."""
    if implementation == "PyTorch":
        pytest.skip("promised in batch-invariant mode only")
    x, weight = random(8, 640, dtype=dtype), random(1001, 640, seed=1, dtype=dtype)
    together = linear(x, weight)
    num_threads = torch.get_num_threads()
    try:
        for first, stop in [(0, 1), (1, 3), (2, 5), (1, 8)]:
            torch.set_num_threads(stop)
            assert torch.equal(linear(x[first:stop], weight), together[first:stop])
    finally:
        torch.set_num_threads(num_threads)


@packs
@given(
    num_rows=st.integers(1, 40),
    in_features=st.sampled_from([2, 32, 96, 100]),
    out_features=st.sampled_from([1, 16, 64, 100, 333]),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
)
def test_a_packed_product_is_that_of_the_plain_weight(
    num_rows: int, in_features: int, out_features: int, has_bias: bool, has_residual: bool
) -> None:
    x, weight = random(num_rows, in_features), random(out_features, in_features, seed=1)
    bias = random(out_features, seed=2) if has_bias else None
    residual = random(num_rows, out_features, seed=3) if has_residual else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if residual is not None:
        expected += residual.double()
    for batch_invariant in (False, True):
        given_residual = None if residual is None else residual.clone()
        actual = linear(
            x,
            PackedWeight(weight),
            bias,
            residual=given_residual,
            batch_invariant=batch_invariant,
        )
        torch.testing.assert_close(actual.double(), expected, rtol=1.6e-2, atol=5e-2)


@packs
@pytest.mark.parametrize("shape", [(512, 64), (1000, 128), (151, 96), (64, 2), (5, 30)])
def test_rows_of_a_packed_table_are_those_of_the_plain_one(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    packed = PackedWeight(weight.clone())
    if not packed.has_rows:  # oneDNN may lay small ones out in other ways: they stay plain
        assert shape[0] < 64
        return
    index = torch.tensor([0, shape[0] - 1, 3, 3, shape[0] // 2])
    assert torch.equal(packed.rows(index), weight[index])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_residual_is_added_to_a_plain_product(batch_invariant: bool) -> None:
    x, weight, bias, residual = (
        random(*shape, seed=i, dtype=torch.float32)
        for i, shape in enumerate([(5, 8), (12, 8), (12,), (5, 12)])
    )
    expected = F.linear(x, weight, bias) + residual
    actual = linear(x, weight, bias, residual=residual, batch_invariant=batch_invariant)
    torch.testing.assert_close(actual, expected)
