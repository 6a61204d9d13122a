"""The kernels' tests: one body for the GPU and for Triton's interpreter on the CPU.

They carry the `gpu` marker. `pytest -m gpu tests/kernels` runs them on a CUDA device; with
TRITON_INTERPRET=1 in the environment they run on the CPU, which is what `test_interpreter.py` does
in a process of its own, since Triton reads the variable when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from nbllm_kernels import AttentionMetadata

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile("interpreter", max_examples=8, deadline=None, derandomize=True)
settings.register_profile("gpu", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("interpreter" if INTERPRETS else "gpu")


def pytest_configure(config: pytest.Config) -> None:
    """NumPy, on which the interpreter computes, warns where a GPU overflows to infinity."""
    if INTERPRETS:
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


@pytest.fixture(scope="session", autouse=True)
def _language_is_patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter patches `triton.language` at each call of a function within a kernel,
    although the launch has done so: more than half of its time."""
    if not INTERPRETS:
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scopes: dict[Any, Any] = {}

    def patch_once(function: Any) -> Any:
        names = function.__globals__
        modules = names.get("tl"), names.get("core")  # what is patched
        if modules not in scopes or not scopes[modules]._changes:  # restored after a launch
            scopes[modules] = patch(function)
        return scopes[modules]

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


@pytest.fixture(scope="session", autouse=True)
def _products_do_not_depend_on_a_row_s_place() -> Iterator[None]:
    """The interpreter multiplies with NumPy, which on some processors adds the numbers of a tile's
    last rows in another order. Of such a difference in float64 nothing is left in float32."""
    if not INTERPRETS:
        yield
        return
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_exact_dot(builder: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        if a.data.dtype.kind != "f":  # the bits of a type that NumPy does not have
            return create_dot(builder, a, b, acc, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + acc.data
        return interpreter.TensorHandle(product.astype(acc.data.dtype), acc.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_exact_dot)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    if INTERPRETS:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def is_interpreted() -> bool:
    return INTERPRETS


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, or the smallest integer: reading them unwritten shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        is_float = tensor.dtype.is_floating_point
        return tensor.fill_(torch.nan if is_float else torch.iinfo(tensor.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def random_tensor(device: torch.device) -> Callable[..., Tensor]:
    """(*shape, dtype=, seed=) -> standard normal numbers on the device."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        if INTERPRETS and dtype == torch.bfloat16:
            # Of which the interpreter makes integers in products, and which it truncates.
            dtype = torch.float16
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def paged_batch(
    device: torch.device, random_tensor: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor, Tensor, AttentionMetadata]]:
    """Query, caches and metadata of sequences given as (new tokens, all tokens), decodes first.

    Pages are dealt at random. Every slot that no sequence has written is NaN.
    """

    def make(
        lens: list[tuple[int, int]],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        batch_invariant: bool = False,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
        query_lens = [query_len for query_len, _ in lens]
        seq_lens = [seq_len for _, seq_len in lens]
        max_blocks = max(-(-seq_len // page_size) for seq_len in seq_lens)
        num_blocks = 1 + len(lens) * max_blocks
        generator = torch.Generator().manual_seed(seed)
        pages = torch.randperm(num_blocks - 1, generator=generator) + 1
        tables = pages.view(len(lens), max_blocks).to(torch.int32)
        shape = (num_blocks, num_kv_heads, page_size, head_dim)
        caches = [random_tensor(*shape, dtype=dtype, seed=seed + i) for i in (1, 2)]
        written = torch.zeros(num_blocks, page_size, dtype=torch.bool)
        slots: list[int] = []
        for table, (query_len, seq_len) in zip(tables.tolist(), lens, strict=True):
            slot = [table[i // page_size] * page_size + i % page_size for i in range(seq_len)]
            written.view(-1)[slot] = True
            slots += slot[seq_len - query_len :]
        for cache in caches:
            cache.masked_fill_(~written.to(device)[:, None, :, None], torch.nan)
        loc = torch.tensor([0, *query_lens]).cumsum(0).to(device=device, dtype=torch.int32)
        query = random_tensor(sum(query_lens), num_heads, head_dim, dtype=dtype, seed=seed + 3)
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(lens))
        metadata = AttentionMetadata(
            query_start_loc=loc,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            num_decode_seqs=num_decodes,
            batch_invariant=batch_invariant,
        )
        return query, caches[0], caches[1], metadata

    return make


@pytest.fixture(scope="module", params=["_cpu_avx512", "_cpu_avx2", "_cpu", "PyTorch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the CPU's ops run on: each build of the C sources, and PyTorch alone."""
    from nbllm_kernels import cpu_native

    builds = cpu_native.usable_builds()
    if request.param not in (*builds, "PyTorch"):
        pytest.skip("not built, or not for this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_native, "library", builds.get(request.param))
        yield request.param
