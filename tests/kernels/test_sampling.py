"""sample on Triton: the same tokens as the reference, which sorts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import SamplingTensors, gumbel_noise, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


def make_params(
    device: torch.device,
    temperature: list[float],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> SamplingTensors:
    size = len(temperature)
    return SamplingTensors(
        temperature=torch.tensor(temperature, device=device),
        top_k=torch.full((size,), top_k, dtype=torch.int32, device=device),
        top_p=torch.full((size,), top_p, device=device),
        min_p=torch.full((size,), min_p, device=device),
        seeds=(torch.arange(size, device=device) - 1) * 0x1234_5678_9ABC + seed,
        positions=torch.arange(size, device=device) * 3 + 1,
        all_greedy=not any(temperature),
        any_filter=top_k > 0 or top_p < 1.0 or min_p > 0.0,
    )


@pytest.mark.parametrize("vocab_size", [1, 100, 8193, 10_000, 151_936])
def test_greedy_takes_the_lowest_of_the_best_ids(
    random_tensor: Callable[..., Tensor], device: torch.device, vocab_size: int
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(4, vocab_size)
    logits[1, vocab_size // 2 :] = 9.0  # ties
    logits[2] = -torch.inf
    logits[3] -= 100.0  # below anything that padding could be
    tokens = sample(logits.clone(), make_params(device, [0.0] * 4))
    expected = [int(row.argmax()) for row in logits.cpu()]
    assert tokens.tolist() == [expected[0], vocab_size // 2, -1, expected[3]]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("vocab_size", [5, 8193])
def test_tokens_without_filters_equal_those_of_the_reference(
    random_tensor: Callable[..., Tensor], device: torch.device, vocab_size: int, spread: float
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(24, vocab_size, seed=vocab_size) * spread
    logits[:8, vocab_size // 3 :] = -torch.inf  # whole tiles
    logits[8:12] -= 1e6
    params = make_params(device, [0.7, 0.0, 1.0, 1.9] * 6, seed=vocab_size)
    assert sample(logits, params).tolist() == reference.sample(logits, params).tolist()


@pytest.mark.parametrize("vocab_size", [100, 8193, 151_936])
def test_noise_is_that_of_the_hash(device: torch.device, vocab_size: int) -> None:
    """Flat logits: the token is the argmax of the noise alone."""
    from nbllm_kernels.gpu.sampling import sample

    num_rows = 16 if vocab_size < 10_000 else 2
    params = make_params(device, [1.0] * num_rows, seed=-5)
    tokens = sample(torch.zeros(num_rows, vocab_size, device=device), params)
    noise = gumbel_noise(params.seeds.cpu(), params.positions.cpu(), vocab_size)
    best = noise.amax(dim=-1)
    chosen = noise.gather(-1, tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-5)
    assert (tokens.cpu() == noise.argmax(dim=-1)).float().mean() > 0.9


@pytest.mark.parametrize("vocab_size", [100, 10_000])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (50, 0.9, 0.02), (1, 1.0, 0.0), (0, 0.0, 0.0)],
)
def test_filtered_tokens_equal_those_of_the_reference(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    vocab_size: int,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(6, vocab_size) * 3
    logits[4, ::3] = -torch.inf  # forbidden ids
    temperature = [0.7, 1.0, 0.0, 1.3, 1.0, 0.01]
    params = make_params(device, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(sample(logits.clone(), params), reference.sample(logits, params))


@pytest.mark.parametrize(
    ("spread", "top_k", "top_p"),
    [
        (0.1, 0, 0.5),  # too many are nearly as likely as the best
        (0.1, 6000, 1.0),
        (6.0, 4500, 1.0),  # the border lies below those that are listed
        (6.0, 0, 0.99999),
        (6.0, 0, 0.9),
        (6.0, 200, 0.99),
    ],
)
def test_a_border_is_found_among_the_largest_or_else_among_all(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    spread: float,
    top_k: int,
    top_p: float,
) -> None:
    from nbllm_kernels.gpu.sampling import _find_thresholds, sample

    logits = random_tensor(2, 9000, seed=top_k) * spread
    params = make_params(device, [1.0, 0.8], top_k=top_k, top_p=top_p)
    assert torch.equal(sample(logits, params), reference.sample(logits, params))
    sure, tied, limit = (x[:, None] for x in _find_thresholds(logits, params.temperature, params))
    scaled = logits / params.temperature[:, None]
    bits = scaled.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=device)
    kept = (keys >= sure) | ((keys >= tied) & (ids <= limit))
    expected = reference.filter_logits(scaled, params.top_k, params.top_p, params.min_p)
    differing = kept != ~torch.isinf(expected)
    if top_p == 1.0:
        assert not differing.any()
    # Where sums are rounded differently, an edge of top_p moves: by hardly any mass.
    mass = (torch.softmax(scaled, dim=-1) * differing).sum(dim=-1)
    assert float(mass.max()) < 1e-5 or int(differing.sum(dim=-1).max()) == 1


def test_ties_at_the_edge_of_top_p_go_to_the_lowest_ids(device: torch.device) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = torch.zeros(6, 40, device=device)
    logits[:, 20] = 1.0
    # 2.718 of 41.718; a half of that takes 19 (18.14 rounded up) of the 39 equal ids.
    params = make_params(device, [1.0] * 6, top_p=0.5)
    tokens = set(sample(logits.clone(), params).tolist())
    assert tokens <= {*range(19), 20}
    assert torch.equal(sample(logits.clone(), params), reference.sample(logits, params))


def test_ties_at_the_edge_of_top_k_all_stay(device: torch.device) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = torch.zeros(24, 12, device=device)
    logits[:, 3] = 0.5
    logits[:, [5, 7, 9]] = 0.25
    params = make_params(device, [1.0] * 24, top_k=2)
    tokens = sample(logits.clone(), params)
    assert set(tokens.tolist()) == {3, 5, 7, 9}
    assert torch.equal(tokens, reference.sample(logits, params))


@pytest.mark.parametrize("vocab_size", [100, 8193, 10_000, 151_936])
@pytest.mark.parametrize("options", [{}, {"top_k": 7, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_a_masked_tail_is_never_drawn(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    is_interpreted: bool,
    vocab_size: int,
    options: dict[str, Any],
) -> None:
    """Masked are the second half, all but the first id, the last tile, all ids."""
    if is_interpreted and options and vocab_size > 100_000:
        pytest.skip("takes the interpreter seconds")
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(5, vocab_size)
    num_allowed = [vocab_size // 2, 1, (vocab_size - 1) // 2048 * 2048 or 1, vocab_size, 0]
    for row, first_masked in zip(logits, num_allowed, strict=True):
        row[first_masked:] = -torch.inf
    for temperature in (0.0, 1.0):
        params = make_params(device, [temperature] * 5, **options)
        tokens = sample(logits.clone(), params).tolist()
        assert all(tokens[i] < num_allowed[i] for i in range(4))
        assert tokens == reference.sample(logits, params).tolist()
        assert tokens[4] == -1


def test_rows_from_which_nothing_can_be_drawn_are_marked(device: torch.device) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = torch.zeros(6, 9000, device=device)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 8999] = torch.inf
    logits[3, 5:] = torch.nan
    logits[4, 1:] = -torch.inf
    for temperature in (0.0, 1.0):
        for options in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
            params = make_params(device, [temperature] * 6, **options)
            tokens = sample(logits.clone(), params).tolist()
            assert tokens[:5] == [-1, -1, -1, -1, 0]
            assert 0 <= tokens[5] < 9000
            on_cpu = make_params(torch.device("cpu"), [temperature] * 6, **options)
            assert tokens == reference.sample(logits.cpu(), on_cpu).tolist()


@given(
    vocab_size=st.integers(1, 300),
    top_k=st.integers(0, 320),
    top_p=st.floats(0.015625, 1.0, width=32),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_filters_equal_the_reference(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    vocab_size: int,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(3, vocab_size, seed=seed).mul(4).round() / 2  # many ties
    params = make_params(device, [1.0, 0.5, 2.0], top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    tokens = sample(logits.clone(), params)
    scaled = logits / params.temperature[:, None]
    # Where sums are rounded differently, an edge of top_p may move by one id.
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for shift in (-1e-5, 0.0, 1e-5):
        moved = (params.top_p + shift).clamp(max=1.0)
        kept = reference.filter_logits(scaled, params.top_k, moved, params.min_p)
        noise = gumbel_noise(params.seeds, params.positions, vocab_size)
        allowed.scatter_(-1, (kept + noise).argmax(dim=-1, keepdim=True), True)
    assert bool(allowed.gather(-1, tokens[:, None]).all())


def test_a_row_does_not_depend_on_the_others(
    random_tensor: Callable[..., Tensor], device: torch.device
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(3, 3000) * 2
    params = make_params(device, [1.0] * 3, top_p=0.9)
    together = sample(logits.clone(), params)
    for i in range(3):
        one = SamplingTensors(
            **{
                name: getattr(params, name)[i : i + 1]
                for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
            },
            all_greedy=False,
            any_filter=True,
        )
        assert int(sample(logits[i : i + 1].clone(), one)) == int(together[i])


def test_logits_of_half_precision_are_drawn_from_as_they_are(
    random_tensor: Callable[..., Tensor], device: torch.device
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    logits = random_tensor(6, 5000, dtype=torch.float16)
    for temperature, options in ((0.0, {}), (1.0, {}), (1.0, {"top_k": 9, "top_p": 0.9})):
        params = make_params(device, [temperature] * 6, **options)
        assert torch.equal(sample(logits, params), sample(logits.float(), params))


def test_wrong_arguments_are_refused(
    random_tensor: Callable[..., Tensor], device: torch.device
) -> None:
    from nbllm_kernels.gpu.sampling import sample

    params = make_params(device, [1.0, 1.0])
    with pytest.raises(ValueError, match="logits must be float16, bfloat16 or float32"):
        sample(random_tensor(2, 50).to(torch.int32), params)
    with pytest.raises(ValueError, match="seeds must be"):
        sample(random_tensor(3, 50), params)
    with pytest.raises(ValueError, match="stride 1"):
        sample(random_tensor(50, 2).T, params)
