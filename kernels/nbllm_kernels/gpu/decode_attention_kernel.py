"""Decode attention: one new token a row, the keys of a row split among several programs.

A program serves all query heads of one key-value head (they share a tile of sixteen rows, so that
a page is read once for the group) and one part of the row's keys. What it is launched with depends
on the numbers of rows and heads alone, never on a length: a split whose part is empty writes zeros
and reads nothing, and so does a row of length 0.

A row's keys that it shares with others are `prefix_attention_kernel`'s business. Where a row's own
keys are not split, the two are put together here; otherwise `merge_splits_kernel` does that.

`decode_attention_kernel` is one long function: its pieces share a dozen values of the program,
which a helper would take and return one by one.

Sources: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867; split keys, "Flash-Decoding",
2023.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.gpu.activation import tanh
from nbllm_kernels.gpu.kv_dtype import to_operand


@triton.jit
def _attend_tile(
    q: tl.tensor,  # [BLOCK_M, PADDED_DIM]
    k: tl.tensor,  # [BLOCK_N, PADDED_DIM]
    v: tl.tensor,
    visible: tl.tensor,  # [BLOCK_N]
    highest: tl.tensor,  # [BLOCK_M], base 2
    total: tl.tensor,
    acc: tl.tensor,  # [BLOCK_M, PADDED_DIM]
    scale: tl.tensor,
    scale_out: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """One step of the online softmax; some key is visible."""
    k = k.to(q.dtype)
    v = v.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        scores = scale_out * tanh(scores)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    probability = tl.exp2(scores - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    total = total * decay + tl.sum(probability, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(probability.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_highest, total, acc


@triton.jit
def _slots(
    table_ptr: tl.tensor,
    page: tl.tensor,  # of the tile, if ONE_PAGE
    key: tl.tensor,
    key_mask: tl.tensor,
    kv_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ONE_PAGE: tl.constexpr,
) -> tl.tensor:
    """Rows of the cache, seen as [rows, head_dim], that hold the keys of a tile."""
    if not ONE_PAGE:
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=key_mask, other=0)
    return (page.to(tl.int64) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE


@triton.jit(do_not_specialize=["stride_table", "window", "total_splits", "merged_splits"])
def decode_attention_kernel(
    q_ptr: tl.tensor,  # [num_rows, num_heads, head_dim]
    k_ptr: tl.tensor,  # [num_blocks, num_kv_heads, page_size, head_dim]
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [num_rows, num_heads, total_splits, head_dim], each split normalized
    lse_ptr: tl.tensor,  # [num_rows, num_heads, total_splits] float32, base 2, if IS_SPLIT
    seq_lens_ptr: tl.tensor,  # [num_rows] int32
    prefix_lens_ptr: tl.tensor,  # [num_rows] int32, if HAS_PREFIX: keys that are not its business
    prefix_out_ptr: tl.tensor,  # [num_rows, num_heads, merged_splits, head_dim], if MERGES
    prefix_lse_ptr: tl.tensor,  # the same without the last; both only for rows with a prefix
    block_tables_ptr: tl.tensor,  # [num_rows, max_blocks] int32
    stride_q_token: tl.tensor,
    stride_table: tl.tensor,
    scale: tl.tensor,  # of q k^T: times log2(e), or divided by the softcap
    scale_out: tl.tensor,  # softcap * log2(e)
    window: tl.tensor,
    total_splits: tl.tensor,  # the last of them, as many as the grid has, are this kernel's
    merged_splits: tl.tensor,  # of the prefix, merged here
    STRIDE_Q_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    seq_len = tl.load(seq_lens_ptr + seq)
    # Keys that are visible: low <= key < seq_len.
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(seq_len - window, 0)
    prefix_len = 0
    if HAS_PREFIX:
        prefix_len = tl.load(prefix_lens_ptr + seq)
        low = tl.maximum(low, prefix_len)
    begin = low // BLOCK_N
    end = tl.cdiv(seq_len, BLOCK_N)
    tiles_per_split = tl.cdiv(end - begin, num_splits)
    begin += split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, end)

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    row_mask = row < GROUP
    q_mask = row_mask[:, None]
    kv_dim = (dim < HEAD_DIM)[None, :]
    if HEAD_DIM != PADDED_DIM:
        q_mask = q_mask & kv_dim
    head = kv_head * GROUP + row
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), dtype=tl.float32)
    table_ptr = block_tables_ptr + seq * stride_table
    # With whole tiles in a page, its index is a scalar that is loaded one tile ahead.
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    page = tl.full((), 0, tl.int32)
    if ONE_PAGE:
        page = tl.load(table_ptr + begin * BLOCK_N // PAGE_SIZE, mask=begin < end, other=0)
    q_ptr += seq * stride_q_token + head[:, None] * STRIDE_Q_HEAD + dim[None, :]

    q = to_operand(tl.load(q_ptr, mask=q_mask, other=0.0), k_ptr.dtype.element_ty)

    for tile in range(begin, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = (key >= low) & (key < seq_len)
        slot = _slots(table_ptr, page, key, visible, kv_head, NUM_KV_HEADS, PAGE_SIZE, ONE_PAGE)
        if ONE_PAGE:
            following = (tile + 1) * BLOCK_N // PAGE_SIZE
            page = tl.load(table_ptr + following, mask=tile + 1 < end, other=0)
        offset = slot[:, None] * HEAD_DIM + dim[None, :]
        # Slots outside of [low, seq_len) may hold anything, NaN included: they are not read.
        kv_mask = visible[:, None]
        if HEAD_DIM != PADDED_DIM:
            kv_mask = kv_mask & kv_dim
        k = tl.load(k_ptr + offset, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + offset, mask=kv_mask, other=0.0)
        highest, total, acc = _attend_tile(
            q, k, v, visible, highest, total, acc, scale, scale_out, HAS_SOFTCAP, PRECISION
        )

    head_row = seq * (NUM_KV_HEADS * GROUP) + head
    if MERGES:
        if prefix_len > 0:  # then its newest key at least is its own: `highest` is finite
            for part in range(merged_splits):
                part_row = head_row * merged_splits + part
                lse = tl.load(prefix_lse_ptr + part_row, mask=row_mask, other=float("-inf"))
                source = prefix_out_ptr + part_row[:, None] * HEAD_DIM + dim[None, :]
                out = tl.load(source, mask=q_mask, other=0.0).to(tl.float32)
                new_highest = tl.maximum(highest, lse)
                decay = tl.exp2(highest - new_highest)
                weight = tl.exp2(lse - new_highest)
                total = total * decay + weight
                acc = acc * decay[:, None] + out * weight[:, None]
                highest = new_highest
    out_row = (head_row + 1) * total_splits - num_splits + split
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    if IS_SPLIT:
        # log2(0) is minus infinity: an empty split has no weight.
        tl.store(lse_ptr + out_row, highest + tl.log2(total), mask=row_mask)


@triton.jit(do_not_specialize=["num_splits", "num_prefix_splits"])
def merge_splits_kernel(
    partial_ptr: tl.tensor,  # [num_heads of all rows, num_splits, head_dim], each normalized
    lse_ptr: tl.tensor,  # [num_heads of all rows, num_splits] float32, base 2
    out_ptr: tl.tensor,  # [num_heads of all rows, head_dim]
    prefix_lens_ptr: tl.tensor,  # [num_rows] int32, if HAS_PREFIX
    num_splits: tl.tensor,  # at most PADDED_SPLITS
    num_prefix_splits: tl.tensor,  # the first so many, written for rows that share a prefix
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    split = tl.arange(0, PADDED_SPLITS)
    is_written = split < num_splits
    if HAS_PREFIX:
        shared = tl.load(prefix_lens_ptr + head // NUM_HEADS)
        is_written = is_written & (split >= tl.where(shared > 0, 0, num_prefix_splits))
    lse = tl.load(lse_ptr + head * num_splits + split, mask=is_written, other=float("-inf"))
    source = partial_ptr + (head * num_splits + split)[:, None] * HEAD_DIM + dim[None, :]
    mask = is_written[:, None] & (dim < HEAD_DIM)[None, :]
    partial = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    highest = tl.max(lse, axis=0)
    # A row of length 0 has no keys at all: -inf - (-inf) would be NaN.
    weight = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight, axis=0)
    out = tl.sum(weight[:, None] * partial, axis=0) / tl.where(total == 0.0, 1.0, total)
    target = out_ptr + head * HEAD_DIM + dim
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
