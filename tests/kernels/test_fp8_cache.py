"""Keys and values in float8: what is stored is the nearest number, and attention reads that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nbllm_kernels import AttentionMetadata, HeadNorm, reference

FP8 = torch.float8_e4m3fn
PagedBatch = Callable[..., tuple[Tensor, Tensor, Tensor, AttentionMetadata]]
# Of the products in float16, whose operands are exact but for the probabilities.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LENS = [(1, 1), (1, 37), (1, 150), (40, 40), (17, 60)]


def to_fp8(batch: tuple[Tensor, Tensor, Tensor, AttentionMetadata]) -> Any:
    query, keys, values, metadata = batch
    return query, keys.float().to(FP8), values.float().to(FP8), metadata


def expected_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, **options: Any
) -> Tensor:
    return reference.paged_attention(
        query.double(), keys.float().double(), values.float().double(), metadata, **options
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 64), (128, 64), (80, 16)])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 24, "softcap": 2.0}], ids=str)
def test_attention_reads_the_numbers_that_are_stored(
    paged_batch: PagedBatch,
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    options: dict[str, Any],
) -> None:
    from nbllm_kernels.gpu.paged_attention import paged_attention

    batch = to_fp8(paged_batch(LENS, head_dim=head_dim, page_size=page_size, dtype=dtype))
    options = {"scale": head_dim**-0.5} | options
    output = paged_attention(*batch, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        output.double(), expected_attention(*batch, **options), rtol=tolerance, atol=tolerance
    )


def cache_and_slots(device: torch.device, head_dim: int) -> tuple[Tensor, Tensor]:
    cache = torch.zeros(2, 4, 2, 16, head_dim, dtype=FP8, device=device)
    slots = torch.tensor([17, 3, -1, 63, 40], device=device)
    return cache, slots


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_nearest_number_is_stored_and_the_largest_in_place_of_more(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    is_interpreted: bool,
    dtype: torch.dtype,
) -> None:
    from nbllm_kernels.gpu.store_kv import store_kv

    key, value = (random_tensor(5, 2, 64, dtype=dtype, seed=i) * 3 for i in (1, 2))
    no_number = torch.nan
    if is_interpreted:  # it loses the carry of a rounding, and NaN
        key, value = (x.float().to(FP8).to(x.dtype) for x in (key, value))
        no_number = 1.0
    key[0, 0, :4] = torch.tensor([470.0, -2000.0, torch.inf, no_number])
    actual, slots = cache_and_slots(device, 64)
    store_kv(key, value, actual[0], actual[1], slots)
    expected, slots = cache_and_slots(torch.device("cpu"), 64)
    reference.store_kv(key.cpu(), value.cpu(), expected[0], expected[1], slots)
    stored = expected[0, 1, 0, 1, :4].float()
    assert stored[:3].tolist() == [448.0, -448.0, 448.0]
    assert is_interpreted or torch.isnan(stored[3])
    assert torch.equal(actual.cpu().float().nan_to_num(99.0), expected.float().nan_to_num(99.0))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [5, 40])
def test_norm_rotation_and_store_in_one_kernel(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    is_interpreted: bool,
    num_tokens: int,
) -> None:
    from nbllm_kernels import cpu_elementwise
    from nbllm_kernels.gpu.attention_inputs import attention_inputs

    head_dim, slots = 64, torch.randperm(64)[:num_tokens]
    qkv = random_tensor(num_tokens, (4 + 2 * 2) * head_dim)
    table = random_tensor(128, head_dim, seed=3)
    positions = torch.arange(num_tokens)
    weights = [random_tensor(head_dim, seed=seed) for seed in (4, 5)]
    outputs = []
    for function, where in (
        (attention_inputs, device),
        (cpu_elementwise.attention_inputs, torch.device("cpu")),
    ):
        cache = torch.zeros(2, 4, 2, 16, head_dim, dtype=FP8, device=where)
        nothing: Any = torch.zeros(1, dtype=torch.int32, device=where)
        metadata = AttentionMetadata(nothing, nothing, nothing, slots.to(where), 1, 1, 0)
        query = function(
            qkv.clone().to(where),
            cache[0],
            cache[1],
            metadata,
            rope=(table.to(where), positions.to(where)),
            norm=HeadNorm(weights[0].to(where), weights[1].to(where), 1e-6),
        )
        outputs.append((query.cpu(), cache.cpu().float()))
    (query, cache), (expected_query, expected_cache) = outputs
    torch.testing.assert_close(query, expected_query, rtol=1e-5, atol=1e-5)
    # Where a number lies half way between two, the last bit of the float32 decides. (The
    # interpreter loses the carry of a rounding.)
    is_close = torch.isclose(cache, expected_cache, rtol=0.13, atol=1e-3)
    assert is_close.all() or is_interpreted
    assert (cache == expected_cache).float().mean() > (0.95 if is_interpreted else 0.99)


@pytest.mark.gpu
def test_another_dtype_is_refused(paged_batch: PagedBatch) -> None:
    from nbllm_kernels.gpu.paged_attention import paged_attention

    query, keys, values, metadata = to_fp8(paged_batch(LENS, dtype=torch.float32))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        paged_attention(query, keys.float().half(), values, metadata, scale=1.0)
    with pytest.raises(ValueError, match="differ in shape or dtype"):
        paged_attention(query, keys.float(), values, metadata, scale=1.0)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 24, "softcap": 2.0}], ids=str)
def test_the_cpu_reads_the_numbers_that_are_stored(
    batch_invariant: bool, options: dict[str, Any]
) -> None:
    from nbllm_kernels import paged_attention

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tables = (torch.randperm(40, generator=generator) + 1).view(5, 8).to(torch.int32)
    keys, values = random(41, 2, 16, 64).to(FP8), random(41, 2, 16, 64).to(FP8)
    query_lens = torch.tensor([query_len for query_len, _ in [(1, 1), (1, 37), (1, 100), (9, 30)]])
    loc = torch.tensor([0, *query_lens.cumsum(0).tolist()], dtype=torch.int32)
    metadata = AttentionMetadata(
        loc,
        torch.tensor([1, 37, 100, 30], dtype=torch.int32),
        tables[:4],
        torch.zeros(12, dtype=torch.int64),
        9,
        100,
        3,
        batch_invariant=batch_invariant,
    )
    query = random(12, 4, 64)
    options = {"scale": 0.125} | options
    output = paged_attention(query, keys, values, metadata, **options)
    expected = expected_attention(query, keys, values, metadata, **options)
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
