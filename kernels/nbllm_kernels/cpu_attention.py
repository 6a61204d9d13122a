"""Paged attention on the CPU.

Decode rows and short chunks of prompts, and in batch-invariant mode all rows, go to C, which reads
the pages where they are. The rest is made of PyTorch's own operators. Prompt chunks go one sequence
at a time. Decode rows without C go together: their pages are gathered per (page, head), which lands
keys and values as [sequence, head, context, head_dim]; then the query heads of a group are the rows
of one `scaled_dot_product_attention`, which keeps the scores in float32. (With `enable_gqa` and one
row per head it is several times slower.) Indices, masks and buffers are made once per step and
shared by its layers: fresh buffers cost more in page faults than the copies do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm_kernels import cpu_native
from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.reference import raw_numbers, visible_keys

# Numbers of queries times keys: up to so many products C is faster than PyTorch's operators.
_SHORT_CHUNK = 4_000_000


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
    """The same as `reference.paged_attention`, faster.

    Unwritten slots of a page must hold finite numbers (zeros, say): they are multiplied by a
    probability of zero.
    """
    options: Any = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    native = cpu_native.takes_attention(query, key_cache, value_cache)
    if metadata.batch_invariant:
        attend_rows = cpu_native.paged_attention if native else _row_by_row
        return attend_rows(query, key_cache, value_cache, metadata, **options)
    loc, seq_lens = _host_lists(metadata)
    num_seqs = metadata.num_decode_seqs
    if native:
        size = query.shape[1] * query.shape[2]
        num_seqs += _num_short_chunks(loc[num_seqs:], seq_lens[num_seqs:], size)
    outputs: list[Tensor] = []
    if num_seqs:
        attend = cpu_native.paged_attention if native else _attend_decodes
        outputs.append(attend(query[: loc[num_seqs]], key_cache, value_cache, metadata, **options))
    for i, seq_len in enumerate(seq_lens[num_seqs:], start=num_seqs):
        k = _gather_sequence(key_cache, metadata.block_tables[i : i + 1], seq_len)
        v = _gather_sequence(value_cache, metadata.block_tables[i : i + 1], seq_len)
        new = query[loc[i] : loc[i + 1]]
        outputs.append(_attend_chunk(new, k.to(query.dtype), v.to(query.dtype), **options))
    if loc[-1] < len(query):
        outputs.append(torch.zeros_like(query[loc[-1] :]))  # of no sequence
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _host_lists(metadata: AttentionMetadata) -> tuple[list[int], list[int]]:
    """`query_start_loc` and `seq_lens`."""
    if "lists" not in metadata.scratch:
        lists = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        metadata.scratch["lists"] = lists
    return cast("tuple[list[int], list[int]]", metadata.scratch["lists"])


def _num_short_chunks(loc: list[int], seq_lens: list[int], size: int) -> int:
    """How many of the first sequences are short chunks; queries have `size` numbers."""
    for i, seq_len in enumerate(seq_lens):
        if (loc[i + 1] - loc[i]) * seq_len * size > _SHORT_CHUNK:
            return i
    return len(seq_lens)


def _gather(cache: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Copy the (page, head) pairs of `index` ([N] int64) to `out` ([N, block_size, head_dim])."""
    size = cache.shape[2] * cache.shape[3]
    numbers = raw_numbers(cache).view(-1, size)
    torch.index_select(numbers, 0, index, out=raw_numbers(out).view(-1, size))
    return out


def _gather_sequence(cache: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """[num_kv_heads, seq_len, head_dim] of one side of the cache; block_table is [1, num_pages]."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    index = _page_head_index(block_table, -(-seq_len // block_size), num_kv_heads)
    out = cache.new_empty(len(index), block_size, head_dim)
    return _gather(cache, index, out).view(num_kv_heads, -1, head_dim)[:, :seq_len]


def _page_head_index(block_tables: Tensor, num_pages: int, num_kv_heads: int) -> Tensor:
    """[num_seqs * num_kv_heads * num_pages]: where to gather from, in this order."""
    pages = block_tables[:, None, :num_pages].long() * num_kv_heads
    return (pages + torch.arange(num_kv_heads)[None, :, None]).flatten()


@dataclass(slots=True)
class _DecodePlan:
    """What depends on the batch alone, not on the layer.

    Attributes:
        index: of `_gather`.
        keys, values: [num_seqs * num_kv_heads * num_pages, block_size, head_dim] buffers.
        positions: [1, num_pages * block_size].
    """

    index: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor


def _decode_plan(
    scratch: dict[Hashable, Any], cache: Tensor, block_tables: Tensor, seq_lens: Tensor
) -> _DecodePlan:
    key = ("plan", cache.shape, cache.dtype)
    if key not in scratch:
        _, num_kv_heads, block_size, head_dim = cache.shape
        num_pages = -(-int(seq_lens.max()) // block_size)
        index = _page_head_index(block_tables, num_pages, num_kv_heads)
        buffers = cache.new_empty(2, len(index), block_size, head_dim)
        positions = torch.arange(num_pages * block_size)[None]
        scratch[key] = _DecodePlan(index, buffers[0], buffers[1], positions)
    plan: _DecodePlan = scratch[key]
    return plan


def _decode_mask(
    scratch: dict[Hashable, Any],
    positions: Tensor,
    seq_lens: Tensor,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """[num_seqs, 1, 1, context]: 0 where a key is seen, else minus infinity."""
    key = ("mask", positions.shape, window, dtype)
    if key not in scratch:
        hidden = positions >= seq_lens[:, None]
        if window is not None:
            hidden |= positions < seq_lens[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        scratch[key] = mask[:, None, None]
    return cast(Tensor, scratch[key])


def _attend_decodes(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One query for each of the first sequences: [num_seqs, num_heads, head_dim]."""
    num_seqs, num_heads, head_dim = query.shape
    block_tables, seq_lens = metadata.block_tables[:num_seqs], metadata.seq_lens[:num_seqs]
    scratch = metadata.scratch
    num_kv_heads = key_cache.shape[1]
    plan = _decode_plan(scratch, key_cache, block_tables, seq_lens)
    shape = (num_seqs, num_kv_heads, -1, head_dim)
    k = _gather(key_cache, plan.index, plan.keys).view(shape).to(query.dtype)
    v = _gather(value_cache, plan.index, plan.values).view(shape).to(query.dtype)
    q = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = _decode_mask(scratch, plan.positions, seq_lens, sliding_window, query.dtype)
    if softcap is None:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
        scores = softcap * torch.tanh(scores / softcap) + mask.float()
        attended = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
    return attended.reshape(num_seqs, num_heads, head_dim)


def _attend_chunk(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """The new tokens of one sequence: query [query_len, num_heads, head_dim], k and v
    [num_kv_heads, seq_len, head_dim]."""
    query_len, seq_len = len(query), k.shape[1]
    group = query.shape[1] // k.shape[0]
    plain = sliding_window is None or sliding_window >= seq_len
    is_causal = plain and query_len == seq_len
    mask = None
    if not is_causal:
        mask = visible_keys(query_len, seq_len, sliding_window, device=query.device)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            k.repeat_interleave(group, dim=0)[None],
            v.repeat_interleave(group, dim=0)[None],
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
        )
        return attended[0].transpose(0, 1)
    if mask is None:
        mask = visible_keys(query_len, seq_len, None, device=query.device)
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    scores = torch.bmm(query.transpose(0, 1).float(), k.transpose(1, 2).float()) * scale
    scores = softcap * torch.tanh(scores / softcap)
    probability = torch.softmax(scores.masked_fill_(~mask, -torch.inf), dim=-1).to(v.dtype)
    return torch.bmm(probability, v).transpose(0, 1)


def _row_by_row(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    **options: Any,
) -> Tensor:
    """Each new token on its own: the shapes, so the order of every sum, depend on its position
    alone."""
    output = query.new_empty(query.shape)
    loc = metadata.query_start_loc.tolist()
    for i, seq_len in enumerate(metadata.seq_lens.tolist()):
        query_len = loc[i + 1] - loc[i]
        for j in range(query_len):
            row = loc[i] + j
            alone = replace(
                metadata,
                block_tables=metadata.block_tables[i : i + 1],
                seq_lens=torch.tensor([seq_len - query_len + j + 1]),
                scratch={},
            )
            output[row] = _attend_decodes(
                query[row : row + 1], key_cache, value_cache, alone, **options
            )[0]
    return output
