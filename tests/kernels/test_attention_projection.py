"""attention_projection on Triton: what attention and a product give one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nbllm_kernels import AttentionMetadata, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

PagedBatch = Callable[..., tuple[Tensor, Tensor, Tensor, AttentionMetadata]]


def check(
    paged_batch: PagedBatch,
    random_tensor: Callable[..., Tensor],
    seq_len: int,
    *,
    num_heads: int = 4,
    head_dim: int = 64,
    out_features: int = 40,
    has_bias: bool = False,
    has_residual: bool = True,
    **options: Any,
) -> None:
    from nbllm_kernels.gpu.attention_projection import attention_projection
    from nbllm_kernels.gpu.decode_attention import Scores

    dtype = torch.bfloat16
    query, keys, values, metadata = paged_batch(
        [(1, seq_len)], num_heads=num_heads, num_kv_heads=2, head_dim=head_dim, dtype=dtype
    )
    in_features = num_heads * head_dim
    weight = random_tensor(out_features, in_features, dtype=dtype, seed=5) / in_features**0.5
    bias = random_tensor(out_features, dtype=dtype, seed=6) if has_bias else None
    residual = random_tensor(1, out_features, dtype=dtype, seed=7) if has_residual else None
    doubles = (query.double(), keys.double(), values.double())
    attended = reference.paged_attention(*doubles, metadata, scale=0.1, **options)
    expected = attended.flatten(1) @ weight.double().T
    for term in (bias, residual):
        if term is not None:
            expected = expected + term.double()
    scores = Scores.make(0.1, options.get("sliding_window"), options.get("softcap"))
    actual = attention_projection(
        query, keys, values, metadata, weight, bias, scores=scores, residual=residual
    )
    assert residual is None or actual is residual
    torch.testing.assert_close(actual.double(), expected, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("seq_len", [1, 64, 200])
def test_splits_are_merged_in_the_product(
    paged_batch: PagedBatch,
    random_tensor: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    num_splits: int,
    seq_len: int,
) -> None:
    from nbllm_kernels.gpu import decode_attention as gpu

    monkeypatch.setattr(gpu, "choose_num_splits", lambda *_: num_splits)
    check(paged_batch, random_tensor, seq_len)
    check(paged_batch, random_tensor, seq_len, has_bias=True, has_residual=False, softcap=3.0)
    check(paged_batch, random_tensor, seq_len, has_bias=True, sliding_window=50)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(6, 64), (2, 80), (2, 16)])
def test_other_shapes_are_merged_before_it(
    paged_batch: PagedBatch, random_tensor: Callable[..., Tensor], num_heads: int, head_dim: int
) -> None:
    check(paged_batch, random_tensor, 200, num_heads=num_heads, head_dim=head_dim)
    check(paged_batch, random_tensor, 200, num_heads=num_heads, head_dim=head_dim, out_features=900)
