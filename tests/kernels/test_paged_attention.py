"""paged_attention on Triton against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import AttentionMetadata, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DECODES = [(1, 1), (1, 37), (1, 16), (1, 100)]
CHUNKS = [(5, 5), (17, 40), (2, 33), (33, 33)]

# The grid: head_dim and queries a group in full, the rest so that any two values meet somewhere.
HEAD_DIMS = [64, 80, 96, 128, 256]
GROUPS = [1, 2, 4, 8]
PAGE_SIZES = [16, 32, 64]
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 24},  # shorter than the prompts
    "softcap": {"softcap": 2.0, "scale": 0.5},
    "window-softcap": {"sliding_window": 24, "softcap": 2.0, "scale": 0.5},
}
LENS: dict[str, list[tuple[int, int]]] = {
    "short-decodes": [(1, 1), (1, 16), (1, 17), (1, 40)],
    "long-decodes": [(1, 64), (1, 257), (1, 130), (1, 300)],  # splits
    "prompts": [(5, 5), (64, 64), (33, 33)],
    "mixed": [(1, 3), (1, 150), (40, 40), (17, 30)],
    "chunks-behind-contexts": [(16, 80), (3, 140), (33, 50)],
}
PagedBatch = Callable[..., tuple[Tensor, Tensor, Tensor, AttentionMetadata]]


def check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    **options: Any,
) -> Tensor:
    """Run the kernel, compare with float64, return its output."""
    from nbllm_kernels.gpu.paged_attention import paged_attention

    options = {"scale": query.shape[-1] ** -0.5} | options
    output = paged_attention(query, key_cache, value_cache, metadata, **options)
    expected = reference.paged_attention(
        query.double(),
        key_cache.double(),
        value_cache.double(),
        metadata,
        **options,
    )
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    return output


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lens", [DECODES, CHUNKS, DECODES + CHUNKS], ids=["1", "n", "mixed"])
def test_decodes_and_chunks(
    paged_batch: PagedBatch, dtype: torch.dtype, lens: list[tuple[int, int]]
) -> None:
    check(*paged_batch(lens, dtype=dtype))


@pytest.mark.parametrize("head_dim", [8, 16, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_head_dims(paged_batch: PagedBatch, head_dim: int, dtype: torch.dtype) -> None:
    check(*paged_batch([(1, 70), (19, 21)], head_dim=head_dim, num_kv_heads=1, dtype=dtype))


def make_grid() -> list[tuple[int, int, int, torch.dtype, str, str]]:
    """(head_dim, group, page size, dtype, scores, lens).

    Each of the twenty combinations of the first five, of which a GPU compiles the kernels anew,
    meets every lens; in the interpreter it meets two of the five.
    """
    dtypes, scores, lens = list(TOLERANCE), list(SCORES), list(LENS)
    points = []
    for h, head_dim in enumerate(HEAD_DIMS):
        for g, group in enumerate(GROUPS):
            i = len(GROUPS) * h + g
            page_size, dtype = PAGE_SIZES[i % 3], dtypes[(2 * h + 2 * g + i // 7) % 3]
            chosen = [lens[(h + 2 * g) % 5], lens[(h + 2 * g + 2) % 5]] if INTERPRETS else lens
            combination = (head_dim, group, page_size, dtype, scores[(g - h) % 4])
            points += [(*combination, name) for name in chosen]
    return points


def test_any_two_values_of_the_grid_meet() -> None:
    values = [HEAD_DIMS, GROUPS, PAGE_SIZES, list(TOLERANCE), list(SCORES), list(LENS)]
    points = make_grid()
    assert len(points) == (40 if INTERPRETS else 100)
    for i, j in combinations(range(6), 2):
        met = {(point[i], point[j]) for point in points}
        assert met == set(product(values[i], values[j])), (i, j)


@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "dtype", "scores", "lens"), make_grid(), ids=str
)
def test_every_point_of_the_grid(
    paged_batch: PagedBatch,
    head_dim: int,
    group: int,
    page_size: int,
    dtype: torch.dtype,
    scores: str,
    lens: str,
) -> None:
    batch = paged_batch(
        LENS[lens],
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        seed=head_dim + group,
    )
    check(*batch, **SCORES[scores])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(7, 1), (6, 2), (20, 1)])
def test_other_groups(paged_batch: PagedBatch, num_heads: int, num_kv_heads: int) -> None:
    options = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "dtype": torch.bfloat16}
    check(*paged_batch([(1, 30), (25, 40)], **options))


@pytest.mark.parametrize("page_size", [1, 8, 24, 128])
def test_other_page_sizes(paged_batch: PagedBatch, page_size: int) -> None:
    check(*paged_batch([(1, 130), (9, 70)], page_size=page_size, dtype=torch.float16))


@pytest.mark.parametrize("window", [1, 5, 16, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sliding_windows(paged_batch: PagedBatch, window: int, dtype: torch.dtype) -> None:
    check(*paged_batch([(1, 90), (1, 3), (40, 60)], dtype=dtype), sliding_window=window)


def test_pages_before_the_window_may_hold_anything(
    paged_batch: PagedBatch,
) -> None:
    query, keys, values, metadata = paged_batch([(1, 90), (20, 60)])
    for seq, first_visible in ((0, 80), (1, 31)):
        gone = metadata.block_tables[seq, : first_visible // 16].long()
        keys[gone], values[gone] = torch.nan, torch.nan
    from nbllm_kernels.gpu.paged_attention import paged_attention

    output = paged_attention(query, keys, values, metadata, scale=0.1, sliding_window=10)
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap(paged_batch: PagedBatch, dtype: torch.dtype) -> None:
    batch = paged_batch([(1, 40), (20, 33)], dtype=dtype)
    check(*batch, softcap=2.0, scale=0.5)
    check(*batch, softcap=2.0, scale=0.5, sliding_window=7)


def test_query_may_be_a_view(paged_batch: PagedBatch, random_tensor: Callable[..., Tensor]) -> None:
    query, *rest = paged_batch(DECODES + CHUNKS)
    fused = torch.cat([query, random_tensor(*query.shape)], dim=-1)
    check(fused[..., : query.shape[-1]], *rest)


@pytest.mark.parametrize(("num_splits", "length"), [(2, 40), (5, 300), (20, 100)])
def test_splits_are_merged(
    paged_batch: PagedBatch, monkeypatch: pytest.MonkeyPatch, num_splits: int, length: int
) -> None:
    from nbllm_kernels.gpu import decode_attention as gpu

    monkeypatch.setattr(gpu, "choose_num_splits", lambda *_: num_splits)
    for dtype, options in product(TOLERANCE, ({}, {"sliding_window": 33})):
        batch = paged_batch([(1, length), (1, 1), (1, 17), (3, 5)], head_dim=80, dtype=dtype)
        check(*batch, **options)


def test_splits_fill_the_device_and_no_more() -> None:
    from nbllm_kernels.gpu.decode_attention import choose_num_splits

    assert choose_num_splits(8, 8, 132) == 8  # no more than tiles
    assert choose_num_splits(8, 640, 132) == choose_num_splits(8, 2048, 132) == 16
    assert choose_num_splits(32, 640, 132) == 9
    assert choose_num_splits(132, 1000, 132) == 1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_rows_without_keys_are_zero_and_read_nothing(
    paged_batch: PagedBatch, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_splits: int
) -> None:
    from nbllm_kernels.gpu import decode_attention as gpu
    from nbllm_kernels.gpu.paged_attention import paged_attention

    monkeypatch.setattr(gpu, "choose_num_splits", lambda *_: num_splits)
    query, keys, values, metadata = paged_batch([(1, 90), (1, 20), (1, 64)], dtype=dtype)
    expected = paged_attention(query, keys, values, metadata, scale=0.2)
    inactive = replace(metadata, seq_lens=metadata.seq_lens.clone(), max_seq_len=1000)
    inactive = replace(inactive, block_tables=metadata.block_tables.repeat(1, 11))
    inactive.seq_lens[1] = 0
    inactive.block_tables[1] = 1 << 30  # reading through it would be out of bounds
    output = paged_attention(query, keys, values, inactive, scale=0.2)
    assert not output[1].any()
    assert torch.equal(output[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("seq_len", [64, 65, 127, 128])
def test_the_newest_key_is_in_the_first_tile_or_not(
    paged_batch: PagedBatch, monkeypatch: pytest.MonkeyPatch, seq_len: int
) -> None:
    from nbllm_kernels.gpu import decode_attention as gpu

    for num_splits, window in ((1, None), (2, None), (2, 5)):
        monkeypatch.setattr(gpu, "choose_num_splits", lambda *_, n=num_splits: n)
        batch = paged_batch([(1, seq_len)], page_size=64, dtype=torch.float16)
        check(*batch, sliding_window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_batch_invariant_rows_are_the_same_alone_and_in_any_chunk(
    paged_batch: PagedBatch, dtype: torch.dtype, window: int | None
) -> None:
    query, keys, values, metadata = paged_batch(
        [(1, 77), (1, 5), (50, 83), (9, 9)], dtype=dtype, batch_invariant=True
    )
    options = {"sliding_window": window}
    whole = check(query, keys, values, metadata, **options)
    start = 2  # the third sequence: 50 tokens behind 33
    for first, last in ((0, 1), (1, 18), (18, 50)):
        part = AttentionMetadata(
            query_start_loc=torch.tensor([0, last - first], dtype=torch.int32).to(query.device),
            seq_lens=torch.tensor([33 + last], dtype=torch.int32).to(query.device),
            block_tables=metadata.block_tables[2:3],
            slot_mapping=metadata.slot_mapping[start + first : start + last],
            max_query_len=last - first,
            max_seq_len=83,
            num_decode_seqs=int(last - first == 1),
            batch_invariant=True,
        )
        alone = check(query[start + first : start + last], keys, values, part, **options)
        assert torch.equal(alone, whole[start + first : start + last])


@given(
    decodes=st.lists(st.integers(1, 90), max_size=3),
    chunks=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5)]),
    head_dim=st.sampled_from([16, 24, 64]),
    page_size=st.sampled_from([8, 16, 64]),
    window=st.none() | st.integers(1, 100),
    batch_invariant=st.booleans(),
)
def test_any_shape(
    paged_batch: PagedBatch,
    decodes: list[int],
    chunks: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    window: int | None,
    batch_invariant: bool,
) -> None:
    lens = [(1, n) for n in decodes] + [(new, new + old) for new, old in chunks]
    if not lens:
        lens = [(1, 1)]
    batch = paged_batch(
        lens,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        batch_invariant=batch_invariant,
    )
    check(*batch, sliding_window=window)


def test_wrong_arguments_are_refused(paged_batch: PagedBatch) -> None:
    from nbllm_kernels.gpu.paged_attention import paged_attention

    query, keys, values, metadata = paged_batch([(1, 20), (3, 9)])

    def refuse(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            paged_attention(*args, **({"scale": 1.0} | options))

    refuse("key_cache must be", query.half(), keys, values, metadata)
    refuse("does not fit the cache", query[..., :32].contiguous(), keys, values, metadata)
    refuse("stride 1", query.transpose(1, 2), keys, values, metadata)
    refuse("value_cache", query, keys, values.transpose(1, 2), metadata)
    refuse("sliding_window is 0", query, keys, values, metadata, sliding_window=0)
    refuse("softcap", query, keys, values, metadata, softcap=-1.0)
    refuse("pages", query, keys, values, replace(metadata, max_seq_len=999))
    longs = replace(metadata, seq_lens=metadata.seq_lens.long())
    refuse("seq_lens must be", query, keys, values, longs)
