"""The CPU's ops, in C and without it, against the references in float64."""

from __future__ import annotations

import platform
import shutil
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import (
    AttentionMetadata,
    HeadNorm,
    attention_inputs,
    cpu_native,
    gelu_and_mul,
    paged_attention,
    reference,
    rms_norm,
    silu_and_mul,
)

FLOAT, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 2e-5, BF16: 1.6e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def make_batch(
    lens: list[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = FLOAT,
    unwritten: float = 0.0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    """Sequences of (new tokens, all tokens), decodes first, in pages dealt at random."""
    num_seqs, max_blocks = len(lens), max(-(-seq_len // block_size) for _, seq_len in lens)
    pages = torch.randperm(num_seqs * max_blocks, generator=torch.Generator().manual_seed(0)) + 1
    tables = pages.view(num_seqs, max_blocks).to(torch.int32)
    shape = (len(pages) + 1, num_kv_heads, block_size, head_dim)
    caches = [random(*shape, seed=i, dtype=dtype) for i in (1, 2)]
    for cache in caches:
        cache[0] = unwritten
        for table, (_, seq_len) in zip(tables.long(), lens, strict=True):
            cache[table[-(-seq_len // block_size) :]] = unwritten
            cache[table[(seq_len - 1) // block_size], :, (seq_len - 1) % block_size + 1 :] = (
                unwritten
            )
    query_lens = [query_len for query_len, _ in lens]
    # As `attention_inputs` leaves it: among the keys and values.
    num_heads = group * num_kv_heads
    query = random(sum(query_lens), num_heads + 3, head_dim, seed=3, dtype=dtype)[:, :num_heads]
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_len for _, seq_len in lens),
        num_decode_seqs=next((i for i, n in enumerate(query_lens) if n != 1), num_seqs),
        batch_invariant=batch_invariant,
    )
    return query, caches[0], caches[1], metadata


def test_it_is_built_where_there_is_a_compiler() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("gcc"):
        pytest.skip("not promised here")
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": 3, "AVX2": 2}.get(capability, 1)
    assert len(cpu_native.usable_builds()) == expected, "install again: pip install -e ."


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_pool_of_threads() -> None:
    with open("/proc/self/maps", encoding="utf-8") as file:
        paths = {line.split()[-1] for line in file if "libgomp" in line}
    assert len(paths) <= 1, paths


@given(
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 11]),
    head_dim=st.sampled_from([16, 40, 64, 80, 128, 256]),  # 40 is not for C
    block_size=st.sampled_from([1, 5, 16, 32, 100]),
    window=st.sampled_from([None, 1, 24, 1000]),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from([FLOAT, BF16]),
)
def test_attention_of_decodes(
    implementation: str,
    lens: list[int],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    in_c = implementation != "PyTorch" and head_dim % 16 == 0
    query, keys, values, metadata = make_batch(
        [(1, seq_len) for seq_len in lens],
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        unwritten=torch.nan if in_c else 0.0,
    )
    assert cpu_native.takes_attention(query, keys, values) == in_c
    options: dict[str, Any] = {"scale": head_dim**-0.5, "sliding_window": window}
    options["softcap"] = softcap
    actual = paged_attention(query, keys, values, metadata, **options)
    wide = query.double(), keys.double(), values.double()
    check(actual, reference.paged_attention(*wide, metadata, **options))


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_of_long_sequences_and_chunks(
    implementation: str, window: int | None, batch_invariant: bool, dtype: torch.dtype
) -> None:
    lens = [(1, 1), (1, 512), (1, 513), (1, 1700), (3, 3), (70, 600), (9, 700), (2, 1026)]
    batch = make_batch(lens, dtype=dtype, batch_invariant=batch_invariant)
    options: dict[str, Any] = {"scale": 0.3, "sliding_window": window}
    wide = [tensor.double() for tensor in batch[:3]]
    check(
        paged_attention(*batch, **options),
        reference.paged_attention(*wide, batch[3], **options),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_decode_does_not_depend_on_its_batch(implementation: str, dtype: torch.dtype) -> None:
    """Bit for bit: whoever is beside it, however many threads there are."""
    if implementation == "PyTorch":
        pytest.skip("promised in batch-invariant mode only, which `test_invariance` tests")
    lens = [(1, 700), (1, 40), (1, 1300), (1, 513)]
    query, keys, values, metadata = make_batch(lens, group=3, dtype=dtype)
    together = paged_attention(query, keys, values, metadata, scale=0.2)
    num_threads = torch.get_num_threads()
    try:
        for i, (_, seq_len) in enumerate(lens):
            torch.set_num_threads(1 + i)
            alone = AttentionMetadata(
                query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
                seq_lens=torch.tensor([seq_len], dtype=torch.int32),
                block_tables=metadata.block_tables[i : i + 1],
                slot_mapping=metadata.slot_mapping[i : i + 1],
                max_query_len=1,
                max_seq_len=seq_len,
                num_decode_seqs=1,
            )
            row = paged_attention(query[i : i + 1], keys, values, alone, scale=0.2)
            assert torch.equal(row[0], together[i])
    finally:
        torch.set_num_threads(num_threads)


def test_indices_out_of_range_are_refused(implementation: str) -> None:
    query, keys, values, metadata = make_batch([(1, 40)])
    qkv, rope = random(1, 6 * 32), (random(20, 32), torch.tensor([20]))
    with pytest.raises((IndexError, RuntimeError)):
        attention_inputs(qkv, keys, values, metadata, rope=rope)
    metadata.slot_mapping[0] = len(keys) * 16
    with pytest.raises((IndexError, RuntimeError)):
        attention_inputs(qkv, keys, values, metadata)
    metadata.block_tables[0, 1] = len(keys)
    with pytest.raises((IndexError, RuntimeError)):
        paged_attention(query, keys, values, metadata, scale=1.0)


@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    size=st.sampled_from([16, 100, 1024]),
    offset=st.sampled_from([0.0, 1.0]),
    has_residual=st.booleans(),
    dtype=st.sampled_from([FLOAT, BF16]),
)
def test_rms_norm(
    implementation: str,
    shape: list[int],
    size: int,
    offset: float,
    has_residual: bool,
    dtype: torch.dtype,
) -> None:
    x, weight = random(*shape, size, dtype=dtype) * 3, random(size, seed=1, dtype=dtype)
    options: dict[str, Any] = {"weight_offset": offset}
    if has_residual:
        residual = random(*shape, size, seed=2, dtype=dtype)
        normed, total = rms_norm(x, weight, 1e-6, residual=residual, **options)
        assert torch.equal(total, x + residual)
        x = total
    else:
        normed = rms_norm(x, weight, 1e-6, **options)
    check(normed, reference.rms_norm(x.double(), weight.double(), 1e-6, **options))


@pytest.mark.parametrize("num_rows", [1, 5, 300])  # 300 are shared among threads
@pytest.mark.parametrize("size", [48, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gated_activations(
    implementation: str, num_rows: int, size: int, dtype: torch.dtype
) -> None:
    x = random(num_rows, 2 * size, dtype=dtype) * 4
    x[0, :7] = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    check(silu_and_mul(x), reference.silu_and_mul(x.double()))
    for approximate in ("none", "tanh"):
        check(gelu_and_mul(x, approximate), reference.gelu_and_mul(x.double(), approximate))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_is_not_hidden(implementation: str, dtype: torch.dtype) -> None:
    """The engine finds damaged weights by it."""
    query, keys, values, metadata = make_batch([(1, 20), (1, 33)], dtype=dtype)
    query[0] = torch.nan
    attended = paged_attention(query, keys, values, metadata, scale=1.0)
    assert attended[0].isnan().all() and attended[1].isfinite().all()
    weight = torch.ones(32, dtype=dtype)
    x = random(2, 32, dtype=dtype)
    x[0, 3] = torch.nan
    assert rms_norm(x, weight, 1e-6)[0].isnan().all() and silu_and_mul(x)[0, 3].isnan()
    qkv = random(2, 6 * 32, dtype=dtype)
    qkv[0] = torch.nan
    norm = HeadNorm(weight, weight, 1e-6)
    assert attention_inputs(qkv, keys, values, metadata, norm=norm)[0].isnan().all()
