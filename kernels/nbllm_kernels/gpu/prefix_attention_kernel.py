"""Attention of many decode rows to the beginning that they share ("cascade", phase one).

Rows of a DataFrame begin with the same template, so their first pages are the same ones. Attended
to row by row, these pages are read once per row; here a tile holds the query heads of many rows, so
that one read of a page serves them all, in products that are large enough for the tensor cores'
fast path. The rest of each row is `decode_attention_kernel`'s business, which puts the two
together by their log-sum-exp, or leaves that to `merge_splits_kernel`.

The kernel is one long function, for the reason that `attention_kernel` gives.

Sources: Hydragen, Juravsky et al. 2024, arXiv:2402.05099; cascade inference, Ye et al. 2024
(FlashInfer, arXiv:2501.01005).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.gpu.activation import tanh
from nbllm_kernels.gpu.kv_dtype import to_operand


@triton.jit(do_not_specialize=["stride_table", "total_splits"])
def prefix_attention_kernel(
    q_ptr: tl.tensor,  # [num_seqs, num_heads, head_dim]
    k_ptr: tl.tensor,  # [num_blocks, num_kv_heads, page_size, head_dim]
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [num_seqs, num_heads, total_splits, head_dim], each split normalized
    lse_ptr: tl.tensor,  # [num_seqs, num_heads, total_splits] float32, base 2
    prefix_lens_ptr: tl.tensor,  # [num_seqs] int32
    tile_rows_ptr: tl.tensor,  # [num_tiles, ROWS] int32, -1 is none
    block_tables_ptr: tl.tensor,  # [num_seqs, max_blocks] int32
    stride_q_token: tl.tensor,
    stride_table: tl.tensor,
    scale: tl.tensor,  # as in decode_attention_kernel
    scale_out: tl.tensor,
    total_splits: tl.tensor,  # the first of them, as many as the grid has, are this kernel's
    STRIDE_Q_HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    leader = tl.load(tile_rows_ptr + tile * ROWS)
    if leader < 0:
        return
    num_keys = tl.load(prefix_lens_ptr + leader)
    index = tl.arange(0, BLOCK_M)
    seq = tl.load(tile_rows_ptr + tile * ROWS + index // GROUP, mask=index < ROWS * GROUP, other=-1)
    row_mask = seq >= 0
    head = kv_head * GROUP + index % GROUP
    dim = tl.arange(0, PADDED_DIM)
    q_mask = row_mask[:, None]
    if HEAD_DIM != PADDED_DIM:
        q_mask = q_mask & (dim < HEAD_DIM)[None, :]
    q_offset = seq.to(tl.int64) * stride_q_token + head * STRIDE_Q_HEAD
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=q_mask, other=0.0)
    q = to_operand(q, k_ptr.dtype.element_ty)

    # Whole pages are shared, and a tile of keys lies within a page: nothing is masked but heads
    # that are padded.
    num_tiles = num_keys // BLOCK_N
    tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(2))
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, num_tiles)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), dtype=tl.float32)
    table_ptr = block_tables_ptr + leader.to(tl.int64) * stride_table
    page = tl.load(table_ptr + begin * BLOCK_N // PAGE_SIZE, mask=begin < end, other=0)
    for number in range(begin, end):
        key = number * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = (page.to(tl.int64) * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE
        following = (number + 1) * BLOCK_N // PAGE_SIZE
        page = tl.load(table_ptr + following, mask=number + 1 < end, other=0)
        kv_offset = slot[:, None] * HEAD_DIM + dim[None, :]
        if HEAD_DIM != PADDED_DIM:
            kv_mask = (dim < HEAD_DIM)[None, :] & (key >= 0)[:, None]
            k = tl.load(k_ptr + kv_offset, mask=kv_mask, other=0.0)
            v = tl.load(v_ptr + kv_offset, mask=kv_mask, other=0.0)
        else:
            k = tl.load(k_ptr + kv_offset)
            v = tl.load(v_ptr + kv_offset)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = scale_out * tanh(scores)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        probability = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(probability, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(probability.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest

    out_row = (seq.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head) * total_splits + split
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    # log2(0) is minus infinity: an empty split has no weight.
    tl.store(lse_ptr + out_row, highest + tl.log2(total), mask=row_mask)
