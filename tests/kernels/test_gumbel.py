"""gumbel: the noise is the function that the module states, in C and without it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbllm_kernels.gumbel import gumbel_noise, gumbel_noise_of_ids

pytestmark = pytest.mark.usefixtures("implementation")

INT64 = st.integers(-(2**63), 2**63 - 1)


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def noise_of(seed: int, position: int, token_id: int) -> float:
    """By the module's formula, in Python's numbers."""
    position_key = mix((position + 0x9E3779B9) % 2**32)
    key_0 = mix(seed % 2**32 ^ position_key)
    key_1 = mix((seed >> 32) % 2**32 ^ mix((key_0 + 0x85EBCA6B) % 2**32))
    hashed = mix(mix((token_id + key_0) % 2**32) ^ key_1)
    w = min((hashed >> 1) + 0.5, 2**31 - 2**7) / 2**31
    return -math.log(-math.log1p(-w))


@given(
    rows=st.lists(st.tuples(INT64, st.integers(0, 2**20)), min_size=1, max_size=3),
    token_id=st.integers(0, 99),
)
def test_noise_is_a_function_of_seed_position_and_id(
    rows: list[tuple[int, int]], token_id: int
) -> None:
    seeds, positions = torch.tensor(rows).unbind(dim=1)
    noise = gumbel_noise(seeds.contiguous(), positions.contiguous(), 100)
    assert noise.shape == (len(rows), 100)
    expected = torch.tensor([noise_of(*row, token_id) for row in rows])
    torch.testing.assert_close(noise[:, token_id], expected, rtol=1e-5, atol=1e-5)


def test_noise_of_some_ids_is_that_of_all() -> None:
    seeds, positions = torch.tensor([3, -7]), torch.tensor([0, 40_000])
    ids = torch.tensor([[5, 0, 69_999], [32_768, 5, 1]])
    every = gumbel_noise(seeds, positions, 70_000)
    assert torch.equal(gumbel_noise_of_ids(seeds, positions, ids), every.gather(1, ids))


def test_noise_of_another_layout_is_the_same() -> None:
    columns = torch.tensor([[11, 1], [12, 2], [13, 3]])
    seeds, positions = columns.unbind(dim=1)  # strided
    expected = gumbel_noise(seeds.contiguous(), positions.contiguous(), 50)
    torch.testing.assert_close(gumbel_noise(seeds, positions, 50), expected, rtol=1e-6, atol=1e-6)
