"""The CPU's ops in C, through ctypes: the same as PyTorch's operators do, in one pass each.

The libraries are built when the package is installed, if there is a compiler; their sources are in
`cpu/`. They know nothing of Python or PyTorch, but take their threads from the OpenMP that PyTorch
has loaded. C trusts its arguments: each op here has a `takes_...` that says whether it may be
called with them. Where it may not, or nothing was built, PyTorch's operators do the work.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata

if TYPE_CHECKING:
    from nbllm_kernels.attention_inputs import HeadNorm

_LANES = 16  # of the longest vector in C: sizes are multiples of it
_MAX_HEAD_DIM = 256
_PART = 512  # keys that a task of attention takes, as in attention.c
_BUILDS = {"AVX512": ("_cpu_avx512", "_cpu_avx2", "_cpu"), "AVX2": ("_cpu_avx2", "_cpu")}
IS_BF16 = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes there are."""

_POINTER, _INT64, _INT, _FLOAT = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
)
_SIGNATURES = {
    "rms_norm": [_POINTER] * 3 + [_INT64] * 2 + [_FLOAT] * 2 + [_INT] * 2,
    "gate_and_mul": [_POINTER] * 2 + [_INT64] * 2 + [_INT] * 3,
    "attention_inputs": [_POINTER] * 8 + [_INT64] * 8 + [_FLOAT] * 2 + [_INT] * 2,
    "paged_attention": [_POINTER],
    "multiply_packed": [_POINTER] * 5 + [_INT64] * 4 + [_INT],
    "multiply_rows": [_POINTER] * 5 + [_INT64] * 3 + [_INT] * 2,
    "negative_w": [_POINTER] * 4 + [_INT64] * 2,
}


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "keys", "values", "out", "parts")),
        *((name, _POINTER) for name in ("block_tables", "sequences", "lens")),
        *((name, _INT64) for name in ("num_rows", "num_heads", "num_kv_heads", "head_dim")),
        *((name, _INT64) for name in ("num_blocks", "block_size", "query_stride")),
        *((name, _INT64) for name in ("table_stride", "max_parts", "window")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _INT) for name in ("bf16", "num_threads")),
    )


def usable_builds() -> dict[str, ctypes.CDLL]:
    """The builds that there are, for the instructions that PyTorch uses here; best first."""
    builds: dict[str, ctypes.CDLL] = {}
    for name in _BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("_cpu",)):
        paths = [Path(__file__).with_name(name + suffix) for suffix in EXTENSION_SUFFIXES]
        for path in filter(Path.exists, paths):
            try:
                build = ctypes.CDLL(str(path))
            except OSError:  # made for another machine, or there is no OpenMP
                continue
            for function, types in _SIGNATURES.items():
                getattr(build, function).argtypes = types
            builds[name] = build
    return builds


library = next(iter(usable_builds().values()), None)
"""None: nothing fits, or was built."""


def takes_rms_norm(x: Tensor, weight: Tensor) -> bool:
    return (
        is_row_of_vectors(x, 1)
        and weight.dtype == x.dtype
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """See `nbllm_kernels.rms_norm`; the product with the weight is not rounded in between."""
    assert library is not None
    size = x.shape[-1]
    out = torch.empty_like(x)
    library.rms_norm(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        x.numel() // size,
        size,
        eps,
        weight_offset,
        IS_BF16[x.dtype],
        torch.get_num_threads(),
    )
    return out


def takes_gate(x: Tensor) -> bool:
    return is_row_of_vectors(x, 2)


def silu_and_mul(x: Tensor) -> Tensor:
    """See `nbllm_kernels.silu_and_mul`; nothing is rounded in between."""
    return _gate_and_mul(x, is_gelu=False)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """See `nbllm_kernels.gelu_and_mul`, of which it is the form with "tanh"."""
    return _gate_and_mul(x, is_gelu=True)


def _gate_and_mul(x: Tensor, *, is_gelu: bool) -> Tensor:
    assert library is not None
    size = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], size)
    library.gate_and_mul(
        out.data_ptr(),
        x.data_ptr(),
        x.numel() // (2 * size),
        size,
        is_gelu,
        IS_BF16[x.dtype],
        torch.get_num_threads(),
    )
    return out


def takes_attention_inputs(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    rope: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
) -> bool:
    num_tokens, head_dim = qkv.shape[0], key_cache.shape[3]
    if not (qkv.is_contiguous() and _takes_cache(qkv.dtype, key_cache, value_cache)):
        return False
    if not _is_index(metadata.slot_mapping, num_tokens):
        return False
    if norm is not None:
        for weight in (norm.query_weight, norm.key_weight):
            if weight.dtype != qkv.dtype or weight.shape != (head_dim,):
                return False
    if rope is None:
        return True
    table, rows = rope
    is_table = table.dtype == torch.float32 and table.is_contiguous()
    return is_table and table.shape[1] <= head_dim and _is_index(rows, num_tokens)


def attention_inputs(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    rope: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
) -> Tensor:
    """See `nbllm_kernels.attention_inputs`; the query stays in `qkv`."""
    assert library is not None
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    table, rows = (None, None) if rope is None else rope
    status = library.attention_inputs(
        qkv.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        metadata.slot_mapping.data_ptr(),
        None if norm is None else norm.query_weight.data_ptr(),
        None if norm is None else norm.key_weight.data_ptr(),
        None if table is None else table.data_ptr(),
        None if rows is None else rows.data_ptr(),
        heads.shape[0],
        num_heads,
        num_kv_heads,
        head_dim,
        0 if table is None else table.shape[1],
        0 if table is None else table.shape[0],
        num_blocks,
        block_size,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        IS_BF16[qkv.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise IndexError("a slot is outside of the cache, or a position of the table of angles")
    return heads[:, :num_heads]


def takes_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    return query.stride()[1:] == (query.shape[2], 1) and _takes_cache(
        query.dtype, key_cache, value_cache
    )


class _AttentionPlan(NamedTuple):
    """What depends on the batch alone, not on the layer: the arguments, and what they point to."""

    arguments: _Attention
    tensors: tuple[Tensor, ...]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`nbllm_kernels.paged_attention` of the first len(query) tokens, one by one.

    A token's result depends on its sequence alone, bit for bit. No slot is read that it does not
    see.
    """
    assert library is not None
    out = query.new_empty(query.shape)
    key = "native attention", query.shape, key_cache.shape, query.dtype
    if key not in metadata.scratch:
        metadata.scratch[key] = _plan_attention(query, key_cache, metadata)
    arguments: _Attention = metadata.scratch[key].arguments
    arguments.query = query.data_ptr()
    arguments.keys = key_cache.data_ptr()
    arguments.values = value_cache.data_ptr()
    arguments.out = out.data_ptr()
    arguments.query_stride = query.stride(0)
    arguments.window = sliding_window or 0
    arguments.scale = scale
    arguments.softcap = softcap or 0.0
    if library.paged_attention(ctypes.addressof(arguments)):
        raise IndexError("a block table points outside of the cache")
    return out


def _plan_attention(
    query: Tensor, key_cache: Tensor, metadata: AttentionMetadata
) -> _AttentionPlan:
    num_rows, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    starts = metadata.query_start_loc.to(torch.int32)
    sequences = torch.repeat_interleave(starts.diff())[:num_rows].to(torch.int32)
    # The last token of a sequence sees all of it, the one before one less, and so on.
    behind = starts[1:][sequences] - torch.arange(1, num_rows + 1, dtype=torch.int32)
    lens = metadata.seq_lens.to(torch.int32)[sequences] - behind
    tables = metadata.block_tables.to(torch.int32).contiguous()
    max_len = int(lens.max()) if num_rows else 0
    if max_len > tables.shape[1] * block_size:
        raise IndexError("a sequence is longer than its row of the block tables")
    max_parts = -(-max_len // _PART)
    parts = torch.empty(num_rows * num_heads * max_parts * (head_dim + 2) if max_parts > 1 else 0)
    arguments = _Attention(
        parts=parts.data_ptr(),
        block_tables=tables.data_ptr(),
        sequences=sequences.data_ptr(),
        lens=lens.data_ptr(),
        num_rows=num_rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        table_stride=tables.shape[1],
        max_parts=max_parts,
        bf16=IS_BF16[query.dtype],
        num_threads=torch.get_num_threads(),
    )
    return _AttentionPlan(arguments, (sequences, lens, tables, parts))


def takes_seeds(seeds: Tensor, positions: Tensor) -> bool:
    return library is not None and all(
        tensor.device.type == "cpu" and _is_index(tensor, len(seeds))
        for tensor in (seeds, positions)
    )


def negative_w(seeds: Tensor, positions: Tensor, ids: Tensor | int) -> Tensor:
    """-w of `nbllm_kernels.gumbel`, for ids [N, M], or those below a number: [N, M] float32."""
    assert library is not None
    rows = None if isinstance(ids, int) else ids.contiguous()
    out = torch.empty(len(seeds), ids if isinstance(ids, int) else ids.shape[1])
    library.negative_w(
        out.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        None if rows is None else rows.data_ptr(),
        *out.shape,
    )
    return out


def is_row_of_vectors(x: Tensor, parts: int) -> bool:
    """Whether the rows of x, cut in so many parts, are whole vectors."""
    return (
        library is not None
        and x.dtype in IS_BF16
        and x.numel() > 0
        and x.shape[-1] % (parts * _LANES) == 0
        and x.is_contiguous()
    )


def _is_index(index: Tensor, size: int) -> bool:
    return index.dtype == torch.int64 and index.shape == (size,) and index.is_contiguous()


def _takes_cache(dtype: torch.dtype, key_cache: Tensor, value_cache: Tensor) -> bool:
    head_dim = key_cache.shape[3]
    return (
        library is not None
        and dtype in IS_BF16
        and head_dim % _LANES == 0
        and head_dim <= _MAX_HEAD_DIM
        and key_cache.dtype == value_cache.dtype == dtype
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
    )
