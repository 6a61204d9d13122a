"""Attention of prompt chunks: one online-softmax loop over pages.

A program serves BLOCK_Q new tokens of one sequence, for all query heads of one key-value head:
token and head of the group together are the rows of its tile, so that a page is read once for the
whole group (grouped-query attention). It walks the keys in tiles that begin at multiples of
BLOCK_N of the *sequence*, whatever was scheduled: a row sees the same sums in the same order in
any batch and any chunk, since a tile that is invisible to a row leaves the row's state unchanged
to the bit (it multiplies by one and adds zero).

`paged_attention_kernel` is one long function: its pieces share a dozen values of the program, which
a helper would take and return one by one.

Sources: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867; FlashAttention-2, Dao 2023,
arXiv:2307.08691; pages, Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels.gpu.activation import tanh
from nbllm_kernels.gpu.kv_dtype import to_operand


@triton.jit
def _find_sequence(
    query_start_loc_ptr: tl.tensor,
    block: tl.tensor,
    first_seq: tl.tensor,
    num_seqs: tl.tensor,
    BLOCK_Q: tl.constexpr,
) -> tl.tensor:
    """The sequence that serves a block of queries: the last one that starts at or before it.

    Sequence i begins at block (tokens before it) // BLOCK_Q + (sequences before it), which leaves
    each room for its last, partial block.
    """
    low = first_seq
    high = first_seq + num_seqs
    while low + 1 < high:
        middle = (low + high) // 2
        tokens = tl.load(query_start_loc_ptr + middle) - first_seq
        if tokens // BLOCK_Q + middle - first_seq <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["first_seq", "num_seqs", "stride_table", "window"])
def paged_attention_kernel(
    q_ptr: tl.tensor,  # [num_tokens, num_heads, head_dim]
    k_ptr: tl.tensor,  # [num_blocks, num_kv_heads, page_size, head_dim]
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [num_tokens, num_heads, head_dim], contiguous
    query_start_loc_ptr: tl.tensor,  # [num_seqs + 1] int32
    seq_lens_ptr: tl.tensor,  # [num_seqs] int32
    block_tables_ptr: tl.tensor,  # [num_seqs, max_blocks] int32
    first_seq: tl.tensor,  # sequences before it have one new token each, and are not served
    num_seqs: tl.tensor,
    stride_q_token: tl.tensor,
    stride_table: tl.tensor,
    scale: tl.tensor,  # of q k^T: times log2(e), or divided by the softcap
    scale_out: tl.tensor,  # softcap * log2(e)
    window: tl.tensor,
    STRIDE_Q_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    # Late blocks have the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    seq = _find_sequence(query_start_loc_ptr, block, first_seq, num_seqs, BLOCK_Q)
    start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - start
    first = (block - ((start - first_seq) // BLOCK_Q + seq - first_seq)) * BLOCK_Q
    if first >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    offset = seq_len - query_len  # position of the first new token

    row = tl.arange(0, BLOCK_M)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_mask = (row < BLOCK_Q * GROUP) & (token < query_len)
    position = offset + token
    dim = tl.arange(0, PADDED_DIM)
    out_row = (start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
    q_offset = (start + token).to(tl.int64) * stride_q_token + head * STRIDE_Q_HEAD
    q_mask = row_mask[:, None]
    if HEAD_DIM != PADDED_DIM:
        q_mask = q_mask & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=q_mask, other=0.0)
    q = to_operand(q, k_ptr.dtype.element_ty)

    # Keys that some row sees: low <= key < high.
    high = offset + tl.minimum(first + BLOCK_Q, query_len)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(offset + first - window + 1, 0)
    begin = low // BLOCK_N
    end = tl.cdiv(high, BLOCK_N)

    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), dtype=tl.float32)
    table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    # With whole tiles in a page, its index is a scalar that is loaded one tile ahead.
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    page = tl.full((), 0, tl.int32)
    if ONE_PAGE:
        page = tl.load(table_ptr + begin * BLOCK_N // PAGE_SIZE, mask=begin < end, other=0)
    for tile in range(begin, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        key_mask = (key >= low) & (key < high)
        if ONE_PAGE:
            slot = (page.to(tl.int64) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE
            following = (tile + 1) * BLOCK_N // PAGE_SIZE
            page = tl.load(table_ptr + following, mask=tile + 1 < end, other=0)
        else:
            pages = tl.load(table_ptr + key // PAGE_SIZE, mask=key_mask, other=0)
            slot = (pages.to(tl.int64) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE
        kv_offset = slot[:, None] * HEAD_DIM + dim[None, :]
        # Slots outside of [low, high) may hold anything, NaN included: they are not read.
        kv_mask = key_mask[:, None]
        if HEAD_DIM != PADDED_DIM:
            kv_mask = kv_mask & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + kv_offset, mask=kv_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = scale_out * tanh(scores)
        visible = (key[None, :] <= position[:, None]) & key_mask[None, :]
        if HAS_WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: -inf - (-inf) would be NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        probability = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(probability, axis=1)
        v = tl.load(v_ptr + kv_offset, mask=kv_mask, other=0.0).to(q.dtype)
        acc = acc * decay[:, None]
        acc = tl.dot(probability.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=q_mask)
