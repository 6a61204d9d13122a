"""attention_inputs: the norms of the heads, the rotation and the write, as if done one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nbllm_kernels import AttentionMetadata, HeadNorm, attention_inputs, reference

on_the_cpu = pytest.mark.usefixtures("implementation")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 32, 8


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def metadata_of(slots: Tensor) -> AttentionMetadata:
    empty = slots.new_empty(0, dtype=torch.int32)
    return AttentionMetadata(
        empty, empty, empty, slots, max_query_len=1, max_seq_len=1, num_decode_seqs=0
    )


def one_by_one(
    qkv: Tensor,
    caches: Tensor,
    slots: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
) -> Tensor:
    """The reference of each op in float64."""
    heads = qkv.double().unflatten(-1, (-1, HEAD_DIM))
    q, k, v = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    if norm is not None:
        options = {"eps": norm.eps, "weight_offset": norm.weight_offset}
        q: Any = reference.rms_norm(q, norm.query_weight.double(), **options)
        k: Any = reference.rms_norm(k, norm.key_weight.double(), **options)
    if rope is not None:
        q, k = reference.rotary(q, k, rope[0].double(), rope[1])
    reference.store_kv(k, v, caches[0], caches[1], slots)
    return q


@on_the_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary_dim", [None, 16, HEAD_DIM])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_result_is_that_of_the_single_ops(
    dtype: torch.dtype,
    rotary_dim: int | None,
    offset: float | None,
    num_tokens: int,
) -> None:
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    qkv = random(num_tokens, width, dtype=dtype)
    slots = torch.randperm(3 * BLOCK_SIZE)[:num_tokens]
    slots[2::3] = -1
    norm = rope = None
    if offset is not None:
        weights = [random(HEAD_DIM, dtype=dtype, seed=i) for i in (1, 2)]
        norm = HeadNorm(weights[0], weights[1], 1e-6, offset)
    if rotary_dim is not None:
        rope = random(50, rotary_dim, seed=3), torch.arange(num_tokens) * 7
    shape = (2, 3, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    expected_caches = torch.zeros(shape, dtype=torch.float64)
    expected = one_by_one(qkv, expected_caches, slots, rope, norm)
    caches = torch.zeros(shape, dtype=dtype)
    query = attention_inputs(qkv, *caches, metadata_of(slots), rope=rope, norm=norm)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(query.double(), expected, **tolerance)
    torch.testing.assert_close(caches.double(), expected_caches, **tolerance)


@on_the_cpu
def test_layers_of_one_step_share_what_depends_on_the_step_alone() -> None:
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    metadata = metadata_of(torch.tensor([3, 9]))
    tables = [random(20, HEAD_DIM, seed=seed) for seed in (1, 2)]
    for table in (*tables, *tables):
        caches = torch.zeros(2, 3, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        expected_caches = caches.double()
        qkv = random(2, width)
        rope = table, torch.tensor([4, 11])
        expected = one_by_one(qkv, expected_caches, metadata.slot_mapping, rope, None)
        query = attention_inputs(qkv, *caches, metadata, rope=rope)
        torch.testing.assert_close(query.double(), expected)
        torch.testing.assert_close(caches.double(), expected_caches)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary_dim", [None, 16, HEAD_DIM])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_one_kernel_gives_what_the_single_ops_give(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    poisoned_memory: None,
    dtype: torch.dtype,
    rotary_dim: int | None,
    offset: float | None,
    num_tokens: int,
) -> None:
    from nbllm_kernels.gpu.attention_inputs import attention_inputs as on_gpu

    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    qkv = random_tensor(num_tokens, width + 16, dtype=dtype)[:, :width]
    dtype = qkv.dtype
    slots = torch.randperm(6 * BLOCK_SIZE)[:num_tokens]
    slots[2::3] = -1
    slots = slots.to(device)
    norm = rope = None
    if offset is not None:
        weights = [random_tensor(HEAD_DIM, dtype=dtype, seed=i) for i in (1, 2)]
        norm = HeadNorm(weights[0], weights[1], 1e-6, offset)
    if rotary_dim is not None:
        rope = random_tensor(300, rotary_dim, seed=3), torch.arange(num_tokens, device=device) * 7
    shape = (2, 6, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    expected_caches = torch.zeros(shape, dtype=torch.float64, device=device)
    expected = one_by_one(qkv, expected_caches, slots, rope, norm)
    caches = torch.zeros(shape, dtype=dtype, device=device)
    query = on_gpu(qkv, *caches, metadata_of(slots), rope=rope, norm=norm)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(query.double(), expected, **tolerance)
    torch.testing.assert_close(caches.double(), expected_caches, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(80, 80), (96, 24), (7, None)])
def test_other_head_dims_in_one_kernel(
    random_tensor: Callable[..., Tensor],
    device: torch.device,
    head_dim: int,
    rotary_dim: int | None,
) -> None:
    from nbllm_kernels.gpu.attention_inputs import attention_inputs as on_gpu

    qkv = random_tensor(3, 5 * head_dim)
    slots = torch.tensor([5, 2, 9], device=device)
    norm = HeadNorm(*(random_tensor(head_dim, seed=i) for i in (1, 2)), 1e-6)
    rope = None
    if rotary_dim is not None:
        rope = random_tensor(9, rotary_dim, seed=3), torch.tensor([8, 0, 3], device=device)
    caches = torch.zeros(2, 3, 1, 4, head_dim, device=device)
    expected_caches = caches.double()
    q, k, v = qkv.double().unflatten(-1, (-1, head_dim)).split([3, 1, 1], dim=1)
    q: Any = reference.rms_norm(q, norm.query_weight.double(), norm.eps)
    k: Any = reference.rms_norm(k, norm.key_weight.double(), norm.eps)
    if rope is not None:
        q, k = reference.rotary(q, k, rope[0].double(), rope[1])
    reference.store_kv(k, v, *expected_caches, slots)
    query = on_gpu(qkv, *caches, metadata_of(slots), rope=rope, norm=norm)
    torch.testing.assert_close(query.double(), q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches.double(), expected_caches, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_wrong_arguments_of_the_kernel_are_refused(
    random_tensor: Callable[..., Tensor], device: torch.device
) -> None:
    from nbllm_kernels.gpu.attention_inputs import attention_inputs as on_gpu

    qkv = random_tensor(2, 10 * HEAD_DIM)
    caches = torch.zeros(2, 3, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, device=device)
    metadata = metadata_of(torch.tensor([3, 9], device=device))
    table, positions = random_tensor(20, HEAD_DIM), torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match="does not fit the cache"):
        on_gpu(qkv[:, :-1], *caches, metadata)
    with pytest.raises(ValueError, match="slot_mapping must be"):
        on_gpu(qkv[:1], *caches, metadata)
    with pytest.raises(ValueError, match="rotary table must be"):
        on_gpu(qkv, *caches, metadata, rope=(table.half(), positions))
    with pytest.raises(ValueError, match="positions must be"):
        on_gpu(qkv, *caches, metadata, rope=(table, positions[:1]))
    with pytest.raises(ValueError, match="norm's weights"):
        on_gpu(qkv, *caches, metadata, norm=HeadNorm(table[0], table[0, :5], 1e-6))
