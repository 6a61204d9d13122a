"""store_kv on Triton against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import reference

pytestmark = pytest.mark.gpu


def stored(store: Callable[..., None], key: Tensor, value: Tensor, slots: Tensor) -> Tensor:
    shape = (2, 40, key.shape[1], 8, key.shape[2])
    cache = torch.full(shape, torch.nan, dtype=key.dtype, device=key.device)
    store(key, value, cache[0], cache[1], slots)
    return cache


@given(
    num_tokens=st.integers(0, 40),
    num_heads=st.integers(1, 9),
    head_dim=st.sampled_from([8, 64, 80, 96, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_tokens_land_in_their_slots_and_nowhere_else(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    from nbllm_kernels.gpu.store_kv import store_kv

    fused = random_tensor(num_tokens, 3, num_heads, head_dim, dtype=dtype)
    key, value = fused[:, 0], fused[:, 2]  # views, as the models pass them
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randperm(320, generator=generator)[:num_tokens]
    slots[1::5] = -1
    slots = slots.to(device)
    actual = stored(store_kv, key, value, slots)
    expected = stored(reference.store_kv, key, value, slots)
    assert torch.equal(actual.nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))


def test_pages_far_beyond_32_bits_of_offset(device: torch.device, is_interpreted: bool) -> None:
    if is_interpreted:
        pytest.skip("needs 17 GB of device memory")
    from nbllm_kernels.gpu.store_kv import store_kv

    cache = torch.zeros(2, 66_000, 1, 128, 512, dtype=torch.bfloat16, device=device)
    key = torch.ones(1, 1, 512, dtype=torch.bfloat16, device=device)
    slot = torch.tensor([65_999 * 128 + 127], device=device)
    store_kv(key, key, cache[0], cache[1], slot)
    assert cache[0, 65_999, 0, 127].sum() == 512
    assert cache[1, 65_999, 0, 127].sum() == 512


def test_wrong_arguments_are_refused(
    random_tensor: Callable[..., Tensor], device: torch.device
) -> None:
    from nbllm_kernels.gpu.store_kv import store_kv

    key = random_tensor(3, 2, 16)
    cache = random_tensor(4, 2, 8, 16)
    slots = torch.arange(3, device=device)
    with pytest.raises(ValueError, match="slot_mapping must be"):
        store_kv(key, key, cache, cache, slots[:2])
    with pytest.raises(ValueError, match="slot_mapping must be"):
        store_kv(key, key, cache, cache, slots.int())
    with pytest.raises(ValueError, match="does not fit the cache"):
        store_kv(key[:, :1], key[:, :1], cache, cache, slots)
    with pytest.raises(ValueError, match="key_cache must be"):
        store_kv(key.half(), key.half(), cache, cache, slots)
