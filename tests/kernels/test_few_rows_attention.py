"""few_rows_attention: norms, rotation, store and attention of few decode rows, as if one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nbllm_kernels import AttentionMetadata, HeadNorm, reference

pytestmark = pytest.mark.gpu

PagedBatch = Callable[..., tuple[Tensor, Tensor, Tensor, AttentionMetadata]]
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def one_by_one(
    qkv: Tensor,
    caches: list[Tensor],
    metadata: AttentionMetadata,
    num_heads: int,
    rope: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
    **masks: Any,
) -> Tensor:
    """The reference of each op in float64; keys and values are stored in the caches."""
    head_dim = caches[0].shape[3]
    num_kv_heads = caches[0].shape[1]
    heads = qkv.double().unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norm is not None:
        options = {"eps": norm.eps, "weight_offset": norm.weight_offset}
        q: Any = reference.rms_norm(q, norm.query_weight.double(), **options)
        k: Any = reference.rms_norm(k, norm.key_weight.double(), **options)
    if rope is not None:
        q, k = reference.rotary(q, k, rope[0].double(), rope[1])
    reference.store_kv(k, v, *caches, metadata.slot_mapping)
    return reference.paged_attention(q, *caches, metadata, **masks)


@pytest.fixture
def check(
    paged_batch: PagedBatch, random_tensor: Callable[..., Tensor], device: torch.device
) -> Callable[..., None]:
    """Compares a batch of decode rows, given by their lengths, with the single ops."""

    def run(
        seq_lens: list[int],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float16,
        rotary_dim: int | None = None,
        offset: float | None = None,
        page_size: int = 16,
        **masks: Any,
    ) -> None:
        from nbllm_kernels.gpu.few_rows_attention import few_rows_attention, serves

        query, keys, values, metadata = paged_batch(
            [(1, n) for n in seq_lens],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            dtype=dtype,
        )
        width = (num_heads + 2 * num_kv_heads) * head_dim
        qkv = random_tensor(len(seq_lens), width + 16, dtype=query.dtype, seed=9)[:, :width]
        norm = rope = None
        if offset is not None:
            weights = [random_tensor(head_dim, dtype=query.dtype, seed=i) for i in (5, 6)]
            norm = HeadNorm(weights[0], weights[1], 1e-6, offset)
        if rotary_dim is not None:
            table = random_tensor(max(seq_lens), rotary_dim, dtype=torch.float32, seed=7).float()
            rope = table, (metadata.seq_lens - 1).clamp(min=0).long()
        masks = {"scale": head_dim**-0.5} | masks
        expected_caches = [keys.double(), values.double()]
        expected = one_by_one(qkv, expected_caches, metadata, num_heads, rope, norm, **masks)
        assert serves(qkv, keys, metadata)
        caches = [keys, values]
        output = few_rows_attention(qkv, *caches, metadata, rope=rope, norm=norm, **masks)
        tolerance = {"rtol": TOLERANCE[query.dtype], "atol": TOLERANCE[query.dtype]}
        torch.testing.assert_close(output.double(), expected, **tolerance)
        for cache, expected_cache in zip(caches, expected_caches, strict=True):
            torch.testing.assert_close(cache.double(), expected_cache, equal_nan=True, **tolerance)

    return run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary_dim", [None, 32, 64])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_the_result_is_that_of_the_single_ops(
    check: Callable[..., None], dtype: torch.dtype, rotary_dim: int | None, offset: float | None
) -> None:
    check([1, 2, 64, 65, 200], dtype=dtype, rotary_dim=rotary_dim, offset=offset)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size"),
    [(8, 1, 128, 64), (2, 2, 80, 32), (14, 2, 64, 64), (4, 4, 96, 8), (3, 1, 256, 128)],
)
@pytest.mark.parametrize(
    "masks", [{}, {"softcap": 3.0}, {"sliding_window": 40}, {"sliding_window": 1}], ids=str
)
def test_any_shape_and_mask(
    check: Callable[..., None],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    masks: dict[str, Any],
) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check([129, 1, 70], page_size=page_size, rotary_dim=head_dim, offset=0.0, **shape, **masks)


def test_one_row_is_split_among_programs(check: Callable[..., None]) -> None:
    for seq_len in (1, 63, 64, 65, 128, 129, 300):
        check([seq_len], num_heads=2, num_kv_heads=1, rotary_dim=64)


def test_keys_and_values_in_float8(
    paged_batch: PagedBatch, random_tensor: Callable[..., Tensor]
) -> None:
    from nbllm_kernels.gpu.few_rows_attention import few_rows_attention

    fp8 = torch.float8_e4m3fn
    _, keys, values, metadata = paged_batch([(1, 1), (1, 70), (1, 150)], dtype=torch.float16)
    caches = [cache.float().to(fp8) for cache in (keys, values)]
    # Numbers that float8 has: the interpreter loses the carry of a rounding.
    qkv = random_tensor(3, 8 * 64, dtype=torch.float16).float().to(fp8).to(torch.float16)
    expected_caches = [cache.float().double() for cache in caches]
    expected = one_by_one(qkv, expected_caches, metadata, 4, None, None, scale=0.1)
    output = few_rows_attention(qkv, caches[0], caches[1], metadata, scale=0.1)
    torch.testing.assert_close(output.double(), expected, rtol=4e-3, atol=4e-3)
    written = metadata.slot_mapping
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        stored = cache.float().transpose(1, 2).flatten(0, 1)[written]
        assert torch.equal(stored.double(), expected_cache.transpose(1, 2).flatten(0, 1)[written])


def test_a_row_of_no_tokens_stores_nothing_and_is_zero(
    paged_batch: PagedBatch, random_tensor: Callable[..., Tensor]
) -> None:
    from nbllm_kernels.gpu.few_rows_attention import few_rows_attention

    _, keys, values, metadata = paged_batch([(1, 20), (1, 33)], dtype=torch.float16)
    metadata.seq_lens[1] = 0
    metadata.slot_mapping[1] = -1
    before = [keys.clone(), values.clone()]
    qkv = random_tensor(2, 8 * 64, dtype=torch.float16)
    output = few_rows_attention(qkv, keys, values, metadata, scale=0.1)
    assert output[0].isfinite().all() and not output[1].any()
    for cache, old in zip((keys, values), before, strict=True):
        assert int((cache != old).any(dim=-1).sum() - old.isnan().any(dim=-1).sum()) in (0, 2)


def test_steps_of_another_kind_are_not_its_business(
    paged_batch: PagedBatch, random_tensor: Callable[..., Tensor]
) -> None:
    from nbllm_kernels.gpu.few_rows_attention import serves

    def is_served(lens: list[tuple[int, int]], dtype: torch.dtype, **changes: Any) -> bool:
        _, keys, _, metadata = paged_batch(lens, dtype=dtype)
        qkv = random_tensor(sum(n for n, _ in lens), 8 * 64, dtype=keys.dtype)
        return serves(qkv, keys, replace(metadata, **changes))

    assert is_served([(1, 9)], torch.float16)
    assert not is_served([(1, 9)], torch.float32)
    assert not is_served([(1, 9), (4, 12)], torch.float16)
    assert not is_served([(1, 9)] * 200, torch.float16)
    assert not is_served([(1, 9)], torch.float16, batch_invariant=True)


def test_what_no_attention_kernel_takes_is_refused(
    paged_batch: PagedBatch, random_tensor: Callable[..., Tensor]
) -> None:
    from nbllm_kernels.gpu.few_rows_attention import few_rows_attention

    _, keys, values, metadata = paged_batch([(1, 9)], dtype=torch.float16)
    qkv = random_tensor(1, 8 * 64, dtype=torch.float16)
    for options in ({"sliding_window": 0}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            few_rows_attention(qkv, keys, values, metadata, scale=0.1, **options)
    with pytest.raises(ValueError, match="3 query heads"):
        few_rows_attention(qkv[:, : 7 * 64], keys, values, metadata, scale=0.1)
    short = replace(metadata, block_tables=metadata.block_tables[:, :0])
    with pytest.raises(ValueError, match="block_tables"):
        few_rows_attention(qkv, keys, values, short, scale=0.1)
