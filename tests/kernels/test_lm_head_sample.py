"""lm_head_sample on Triton: the tokens that stored logits would have given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nbllm_kernels import SamplingTensors, gumbel_noise, sample

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

SHAPES = [(1, 3000, 64), (3, 700, 320), (4, 5, 48), (16, 300, 200), (1, 100, 9000)]


def make_params(device: torch.device, temperature: list[float]) -> SamplingTensors:
    size = len(temperature)
    return SamplingTensors(
        temperature=torch.tensor(temperature, device=device),
        top_k=torch.zeros(size, dtype=torch.int32, device=device),
        top_p=torch.ones(size, device=device),
        min_p=torch.zeros(size, device=device),
        seeds=(torch.arange(size, device=device) - 1) * 0x1234_5678_9ABC,
        positions=torch.arange(size, device=device) * 3 + 1,
        all_greedy=not any(temperature),
        any_filter=False,
    )


@pytest.mark.parametrize(("num_rows", "vocab_size", "in_features"), SHAPES)
def test_tokens_are_the_best_of_all(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    num_rows: int,
    vocab_size: int,
    in_features: int,
) -> None:
    from nbllm_kernels.gpu.lm_head_sample import lm_head_sample

    dtype = torch.bfloat16
    hidden = random_tensor(num_rows, in_features + 8, dtype=dtype)[:, :in_features]
    weight = random_tensor(vocab_size, in_features, dtype=dtype, seed=1) * 2 / in_features**0.5
    logits = hidden.double() @ weight.double().T
    for temperature in ([0.0] * num_rows, [0.7 * (i % 3) for i in range(1, num_rows + 1)]):
        params = make_params(device, temperature)
        tokens = lm_head_sample(hidden, weight, params)
        is_greedy = (params.temperature == 0)[:, None]
        noise = gumbel_noise(params.seeds.cpu(), params.positions.cpu(), vocab_size).to(device)
        scaled = logits / params.temperature.double()[:, None].masked_fill(is_greedy, 1.0)
        scaled = scaled + noise.double().masked_fill(is_greedy, 0.0)
        chosen = scaled.gather(-1, tokens[:, None])
        # The products are rounded to the dtype: close to the best, if not the best.
        tolerance = 5e-2 if hidden.dtype == torch.bfloat16 else 8e-3
        assert bool((scaled.amax(dim=-1, keepdim=True) - chosen < tolerance).all())


@pytest.mark.parametrize(("num_rows", "vocab_size", "in_features"), SHAPES)
def test_tokens_are_those_of_stored_logits(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    num_rows: int,
    vocab_size: int,
    in_features: int,
) -> None:
    from nbllm_kernels.gpu.device import num_multiprocessors
    from nbllm_kernels.gpu.lm_head_sample import head_shape, lm_head_sample
    from nbllm_kernels.gpu.skinny_linear import skinny_linear

    hidden = random_tensor(num_rows, in_features, dtype=torch.float16)
    weight = random_tensor(vocab_size, in_features, dtype=torch.float16, seed=1) / in_features**0.5
    shape = head_shape(num_rows, vocab_size, in_features, num_multiprocessors(device))
    logits = skinny_linear(hidden, weight, shape=shape)
    for temperature in ([0.0] * num_rows, [0.5 * (i % 3) for i in range(1, num_rows + 1)]):
        params = make_params(device, temperature)
        assert torch.equal(lm_head_sample(hidden, weight, params), sample(logits, params))


@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_ties_go_to_the_lowest_id(device: torch.device, num_rows: int) -> None:
    from nbllm_kernels.gpu.lm_head_sample import lm_head_sample

    hidden = torch.ones(num_rows, 32, dtype=torch.float16, device=device)
    weight = torch.zeros(500, 32, dtype=torch.float16, device=device)
    weight[[77, 78, 300, 499]] = 1.0
    params = make_params(device, [0.0] * num_rows)
    assert lm_head_sample(hidden, weight, params).tolist() == [77] * num_rows
    assert lm_head_sample(-hidden, weight, params).tolist() == [0] * num_rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_rows_that_are_not_numbers_are_reported(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    num_rows: int,
    temperature: float,
) -> None:
    from nbllm_kernels.gpu.lm_head_sample import lm_head_sample

    hidden = random_tensor(num_rows, 64, dtype=torch.float16)
    weight = random_tensor(400, 64, dtype=torch.float16, seed=1)
    params = make_params(device, [temperature] * num_rows)
    expected = lm_head_sample(hidden, weight, params)
    assert bool((expected >= 0).all())
    broken: list[tuple[int, Any]] = [(0, torch.nan), (num_rows - 1, torch.inf)]
    for row, value in broken:
        spoiled = hidden.clone()
        spoiled[row, 3] = value
        tokens = lm_head_sample(spoiled, weight, params)
        assert int(tokens[row]) == -1
        others = torch.arange(num_rows, device=device) != row
        assert torch.equal(tokens[others], expected[others])


def test_filters_are_refused(random_tensor: Callable[..., Tensor], device: torch.device) -> None:
    from nbllm_kernels.gpu.lm_head_sample import lm_head_sample

    params = make_params(device, [1.0])
    params.any_filter = True
    hidden = random_tensor(1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="filters"):
        lm_head_sample(hidden, hidden, params)
