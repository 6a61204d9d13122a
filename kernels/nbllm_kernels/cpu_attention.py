"""Paged attention on the CPU, out of PyTorch's own operators.

Decode rows go together: pages are gathered per (page, head), which lands keys and values as
[sequence * head, context, head_dim], ready for two batched matrix products in which the query
heads of a group are the rows. Prompt chunks go one sequence at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm_kernels.attention_metadata import AttentionMetadata
from nbllm_kernels.reference import visible_keys


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
    if metadata.batch_invariant:
        return _row_by_row(query, key_cache, value_cache, metadata, scale, sliding_window, softcap)
    num_decodes = metadata.num_decode_seqs
    outputs: list[Tensor] = []
    if num_decodes:
        outputs.append(
            _attend_decodes(
                query[:num_decodes],
                key_cache,
                value_cache,
                metadata.block_tables[:num_decodes],
                metadata.seq_lens[:num_decodes],
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        )
    loc = metadata.query_start_loc.tolist()
    for i, seq_len in enumerate(metadata.seq_lens.tolist()[num_decodes:], start=num_decodes):
        k = _gather(key_cache, metadata.block_tables[i : i + 1], seq_len)
        v = _gather(value_cache, metadata.block_tables[i : i + 1], seq_len)
        outputs.append(
            _attend_chunk(
                query[loc[i] : loc[i + 1]],
                k[0, :, :seq_len],
                v[0, :, :seq_len],
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _gather(cache: Tensor, block_tables: Tensor, max_seq_len: int) -> Tensor:
    """[num_seqs, num_kv_heads, num_pages * block_size, head_dim] of one side of the cache."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    num_pages = -(-max_seq_len // block_size)
    pages = block_tables[:, None, :num_pages].long() * num_kv_heads
    index = pages + torch.arange(num_kv_heads)[None, :, None]
    gathered = cache.flatten(0, 1).index_select(0, index.flatten())
    return gathered.view(len(block_tables), num_kv_heads, num_pages * block_size, head_dim)


def _attend_decodes(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One query per sequence: [num_seqs, num_heads, head_dim]."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[1]
    max_seq_len = int(seq_lens.max())
    k = _gather(key_cache, block_tables, max_seq_len).flatten(0, 1)
    v = _gather(value_cache, block_tables, max_seq_len).flatten(0, 1)
    q = query.reshape(num_seqs * num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.bmm(q, k.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(k.shape[1])[None, :]
    hidden = position >= seq_lens[:, None]
    if sliding_window is not None:
        hidden |= position < seq_lens[:, None] - sliding_window
    scores = scores.view(num_seqs, -1, k.shape[1]).masked_fill_(hidden[:, None], -torch.inf)
    probability = torch.softmax(scores, dim=-1).view(*q.shape[:2], -1).to(v.dtype)
    return torch.bmm(probability, v).view(num_seqs, num_heads, head_dim)


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
    scores = torch.bmm(query.transpose(0, 1), k.transpose(1, 2)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    probability = torch.softmax(scores.masked_fill_(~mask, -torch.inf), dim=-1).to(v.dtype)
    return torch.bmm(probability, v).transpose(0, 1)


def _row_by_row(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Each new token on its own: the shapes, so the order of every sum, depend on its position
    alone."""
    output = torch.empty_like(query)
    loc = metadata.query_start_loc.tolist()
    for i, seq_len in enumerate(metadata.seq_lens.tolist()):
        query_len = loc[i + 1] - loc[i]
        for j in range(query_len):
            row = loc[i] + j
            output[row] = _attend_decodes(
                query[row : row + 1],
                key_cache,
                value_cache,
                metadata.block_tables[i : i + 1],
                torch.tensor([seq_len - query_len + j + 1]),
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
            )[0]
    return output
