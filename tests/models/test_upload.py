"""Weights arrive whole, whatever the size of the pieces in which they travel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbllm import ModelLoadError
from nbllm.models.upload import Upload

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=6),
    piece_bytes=st.sampled_from([4, 8, 64, 1000]),
    source_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
)
def test_every_number_arrives(
    shapes: list[tuple[int, int]],
    piece_bytes: int,
    source_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    upload = Upload(CPU, is_staged=True, piece_bytes=piece_bytes)
    generator = torch.Generator().manual_seed(piece_bytes)
    pairs = []
    for number, shape in enumerate(shapes):
        source = torch.randn(shape, generator=generator).to(source_dtype)
        if number % 3 == 2:
            source = source.t().contiguous().t()  # stored the other way round
        fused = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=dtype)
        upload.copy(source, fused[2:-1], f"tensor {number}")
        pairs.append((source, fused))
    upload.finish()
    for source, fused in pairs:
        assert torch.equal(fused[2:-1], source.to(dtype))
        assert (fused[:2] == 7.0).all() and (fused[-1:] == 7.0).all()


@pytest.mark.gpu
def test_every_number_arrives_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    upload = Upload(device, piece_bytes=1 << 16)
    sources = [torch.randn(1000, 300), torch.randn(7), torch.randn(50_000).half()]
    targets = [torch.empty(s.shape, dtype=torch.bfloat16, device=device) for s in sources]
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        upload.copy(source, target, f"tensor {number}")
    upload.finish()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target.cpu(), source.to(torch.bfloat16))


@pytest.mark.parametrize("is_staged", [False, True])
def test_the_first_tensor_that_is_not_finite_is_named(is_staged: bool) -> None:
    upload = Upload(CPU, is_staged=is_staged, piece_bytes=8)
    for number, value in enumerate([1.0, torch.nan, torch.inf]):
        upload.copy(torch.full((5,), value), torch.empty(5), f"file, tensor {number}")
    with pytest.raises(ModelLoadError, match="file, tensor 1: contains NaN"):
        upload.finish()


def test_another_shape_or_dtype_is_named() -> None:
    upload = Upload(CPU)
    with pytest.raises(ModelLoadError, match=r"w: shape \(3,\), and config.json says \(2,\)"):
        upload.copy(torch.zeros(3), torch.zeros(2), "w")
    with pytest.raises(ModelLoadError, match=r"w: dtype torch\.int8 is not supported"):
        upload.copy(torch.zeros(2, dtype=torch.int8), torch.zeros(2), "w")
