"""skinny_linear on Triton against float64, with every prologue and epilogue."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
EPS = 1e-6


def expected_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Any,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """In float64."""
    y = x.double()
    if norm is not None:
        y = y / (y.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
        y = y * (norm.weight.double() + norm.weight_offset)
    y = y @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if residual is not None:
        y = y + residual.double()
    if activation == "silu":
        y = reference.silu_and_mul(y)
    elif activation != "none":
        y = reference.gelu_and_mul(y, "tanh" if activation == "gelu_tanh" else "none")
    return y


def check(
    random_tensor: Callable[..., Tensor],
    num_rows: int,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    offset: float | None = None,
    has_bias: bool = False,
    has_residual: bool = False,
    activation: Any = "none",
    shape: Any = None,
) -> Tensor:
    from nbllm_kernels.gpu.skinny_linear import Norm, skinny_linear

    x = random_tensor(num_rows, in_features + 8, dtype=dtype)[:, :in_features] * 3
    weight = random_tensor(out_features, in_features, dtype=dtype, seed=1) / in_features**0.5
    bias = random_tensor(out_features, dtype=dtype, seed=2) if has_bias else None
    residual = random_tensor(num_rows, out_features, dtype=dtype, seed=3)
    residual = residual if has_residual else None
    norm = None
    if offset is not None:
        norm = Norm(random_tensor(in_features, dtype=dtype, seed=4), EPS, offset)
    expected = expected_output(x, weight, bias, norm, residual, activation)
    actual = skinny_linear(
        x, weight, bias, norm=norm, residual=residual, activation=activation, shape=shape
    )
    assert residual is None or actual is residual
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    return actual


EPILOGUES: list[dict[str, Any]] = [
    {},
    {"has_bias": True},
    {"has_residual": True},
    {"has_bias": True, "has_residual": True},
    {"activation": "silu"},
    {"activation": "gelu", "has_bias": True},
    {"activation": "gelu_tanh"},
]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_prologues_and_epilogues(
    random_tensor: Callable[..., Tensor], num_rows: int, offset: float | None
) -> None:
    for epilogue in EPILOGUES:
        check(random_tensor, num_rows, 72, 320, offset=offset, **epilogue)


@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("in_features", [16, 1000, 4096, 9000])
def test_long_and_short_inner_dimensions(
    random_tensor: Callable[..., Tensor], num_rows: int, in_features: int
) -> None:
    check(random_tensor, num_rows, 40, in_features, offset=0.0, activation="silu")
    check(random_tensor, num_rows, 33, in_features, has_residual=True, dtype=torch.float16)


def test_every_launch_shape(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.skinny_linear import GemvShape, MatmulShape

    shapes: list[Any] = [
        GemvShape(block_n, block_k, chunks, 4)
        for block_n, (block_k, chunks) in product((4, 16), ((512, 1), (128, 4), (128, 2)))
    ]
    shapes += [MatmulShape(n, k, s, 4, 3, 8) for n, k, s in product((16, 64), (64,), (1, 2, 4))]
    for shape in shapes:
        check(random_tensor, 1, 70, 500, offset=1.0, has_bias=True, shape=shape)
        check(random_tensor, 1, 70, 500, offset=0.0, activation="gelu", shape=shape)


def test_large_activations_do_not_overflow(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.skinny_linear import Norm, skinny_linear

    weight = random_tensor(48, 512, dtype=torch.float16, seed=1) / 512**0.5
    norm = Norm(torch.full_like(weight[0], 3.0), EPS)
    for num_rows in (1, 16):
        x = random_tensor(num_rows, 512, dtype=torch.float16) * 12_000
        x = x.clamp(-65_000, 65_000)
        expected = expected_output(x, weight, None, norm, None, "none")
        actual = skinny_linear(x, weight, norm=norm)
        torch.testing.assert_close(actual.double(), expected, rtol=5e-3, atol=2e-2)


@given(
    num_rows=st.integers(1, 16),
    out_features=st.integers(1, 60),
    in_features=st.integers(1, 600),
    epilogue=st.sampled_from(EPILOGUES),
    has_norm=st.booleans(),
)
def test_any_shape(
    random_tensor: Callable[..., Tensor],
    num_rows: int,
    out_features: int,
    in_features: int,
    epilogue: dict[str, Any],
    has_norm: bool,
) -> None:
    if "activation" in epilogue:
        out_features *= 2
    offset = 0.0 if has_norm else None
    check(random_tensor, num_rows, out_features, in_features, offset=offset, **epilogue)


def test_shapes_of_real_models_fill_the_device() -> None:
    from nbllm_kernels.gpu.skinny_linear import GemvShape, launch_shape

    normed = [(4096, 1024), (6144, 1024), (3072, 2048), (16384, 2048), (6144, 4096), (28672, 4096)]
    plain = [(1024, 2048), (1024, 3072), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336)]
    for (out_features, in_features), has_norm in [
        *product(normed, [True]),
        *product(plain, [False]),
    ]:
        shape = launch_shape(1, out_features, in_features, 132, has_norm=has_norm)
        assert isinstance(shape, GemvShape)
        assert shape.block_k * shape.chunks >= in_features or not has_norm  # no loop
        assert out_features // shape.block_n >= 96
        assert 2 * shape.block_n * shape.block_k * shape.chunks <= 65_536


def test_wrong_arguments_are_refused(random_tensor: Callable[..., Tensor]) -> None:
    from nbllm_kernels.gpu.skinny_linear import Norm, skinny_linear

    x = random_tensor(2, 32, dtype=torch.float16)
    weight = random_tensor(6, 32, dtype=torch.float16)

    def refuse(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            skinny_linear(*args, **options)

    refuse("float16 or bfloat16", x.float(), weight.float())
    refuse("don't fit", x, weight[:, :16])
    refuse("don't fit", x.repeat(9, 1), weight)
    refuse("bias must be", x, weight, weight[0])
    refuse("norm weight must be", x, weight, norm=Norm(weight[0, :5], EPS))
    refuse("residual must be", x, weight, residual=x)
    refuse("does not go with", x, weight, residual=x[:, :6], activation="silu")
    refuse("gate and up of 5", x, weight[:5], activation="silu")
