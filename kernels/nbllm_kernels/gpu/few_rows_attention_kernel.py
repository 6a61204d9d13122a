"""Decode attention of few rows, from the fused projection: one kernel in the place of two.

A program serves all query heads of one key-value head and one part of the row's keys, as in
`decode_attention_kernel`. Before that it norms and rotates its query heads itself. The parts are of
the old keys, those that earlier steps have stored; the last program of a row norms, rotates and
stores the newest key and value, and attends to them out of its registers. So nobody waits for them,
and no kernel has to run in between. A query head is done once for every part, which costs less than
a launch as long as rows are few.

The first tile of keys and values is requested before `gdc_wait`: the rules of
`programmatic_launch` allow that for old tokens.

The kernel is one long function, for the reason that `decode_attention_kernel` gives; and what it
does before `gdc_wait` and after it can be read off.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.gpu.activation import tanh
from nbllm_kernels.gpu.decode_attention_kernel import attend_tile, load_tile
from nbllm_kernels.gpu.kv_dtype import to_cache, to_operand


@triton.jit
def _transform_heads(
    x_ptr: tl.tensor,  # [M, 1], the first number of each head
    dim: tl.tensor,  # [1, PADDED_DIM]
    mask: tl.tensor,  # [M, 1]
    norm_weight_ptr: tl.tensor,  # [HEAD_DIM], if HAS_NORM
    cos_sin_ptr: tl.tensor,  # [2 * HALF] float32, of the token's position, if HAS_ROPE
    eps: tl.tensor,
    weight_offset: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
) -> tl.tensor:
    """[M, PADDED_DIM] float32: the heads normed and rotated, see `attention_inputs`."""
    x = tl.load(x_ptr + dim, mask=mask & (dim < HEAD_DIM), other=0.0).to(tl.float32)
    # Each number is rotated with the one half the rotated part away.
    is_first = dim < HALF
    is_rotated = dim < 2 * HALF
    other_dim = tl.where(is_first, dim + HALF, dim - HALF)
    other = x
    if HAS_ROPE:
        other = tl.load(x_ptr + other_dim, mask=mask & is_rotated, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(x * x, axis=1, keep_dims=True)
        scale = 1.0 / tl.sqrt_rn(square / HEAD_DIM + eps)
        weight = tl.load(norm_weight_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        x = x * scale * (weight + weight_offset)
        if HAS_ROPE:
            weight = tl.load(norm_weight_ptr + other_dim, mask=is_rotated, other=0.0)
            other = other * scale * (weight.to(tl.float32) + weight_offset)
    if HAS_ROPE:
        angle = tl.where(is_first, dim, dim - HALF)
        cos = tl.load(cos_sin_ptr + angle, mask=is_rotated, other=1.0)
        sin = tl.load(cos_sin_ptr + HALF + angle, mask=is_rotated, other=0.0)
        x = x * cos + other * tl.where(is_first, -sin, sin)
    return x


@triton.jit(do_not_specialize=["stride_table", "window"])
def few_rows_attention_kernel(
    qkv_ptr: tl.tensor,  # [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]
    k_ptr: tl.tensor,  # [num_blocks, num_kv_heads, page_size, head_dim]
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [num_rows, num_heads, NUM_SPLITS, head_dim], each split normalized
    lse_ptr: tl.tensor,  # [num_rows, num_heads, NUM_SPLITS] float32, base 2, if NUM_SPLITS > 1
    seq_lens_ptr: tl.tensor,  # [num_rows] int32
    block_tables_ptr: tl.tensor,  # [num_rows, max_blocks] int32
    slot_mapping_ptr: tl.tensor,  # [num_rows] int64
    cos_sin_ptr: tl.tensor,  # [positions, 2 * HALF] float32, if HAS_ROPE
    positions_ptr: tl.tensor,  # [num_rows] int64, if HAS_ROPE
    query_norm_ptr: tl.tensor,  # [head_dim], if HAS_NORM
    key_norm_ptr: tl.tensor,
    stride_qkv_row: tl.tensor,
    stride_table: tl.tensor,
    scale: tl.tensor,  # as in decode_attention_kernel
    scale_out: tl.tensor,
    window: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    STRIDE_COS_SIN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    if LAUNCH_PDL:
        gdc_launch_dependents()
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + seq)
    newest = seq_len - 1
    low = 0  # keys that are visible: low <= key < seq_len
    if HAS_WINDOW:
        low = tl.maximum(seq_len - window, 0)
    begin = low // BLOCK_N
    end = tl.where(low < newest, tl.cdiv(newest, BLOCK_N), begin)
    tiles_per_split = tl.cdiv(end - begin, NUM_SPLITS)
    begin += split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, end)

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    row_mask = row < GROUP
    kv_dim = (dim < HEAD_DIM)[None, :]
    head = kv_head * GROUP + row
    table_ptr = block_tables_ptr + seq * stride_table
    # With whole tiles in a page, its index is a scalar that is loaded one tile ahead.
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    page = tl.full((), 0, tl.int32)
    if ONE_PAGE:
        page = tl.load(table_ptr + begin * BLOCK_N // PAGE_SIZE, mask=begin < end, other=0)
    key = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    # An empty split begins at its end, or behind it.
    visible = (key >= low) & (key < tl.minimum(newest, end * BLOCK_N))
    k, v = load_tile(
        k_ptr,
        v_ptr,
        table_ptr,
        page,
        key,
        visible,
        kv_head,
        dim,
        NUM_KV_HEADS,
        HEAD_DIM,
        PADDED_DIM,
        PAGE_SIZE,
        ONE_PAGE,
    )
    if ONE_PAGE:
        following = (begin + 1) * BLOCK_N // PAGE_SIZE
        page = tl.load(table_ptr + following, mask=begin + 1 < end, other=0)
    new_slot = tl.load(slot_mapping_ptr + seq)
    angles_ptr = cos_sin_ptr
    if HAS_ROPE:
        angles_ptr += tl.load(positions_ptr + seq) * STRIDE_COS_SIN
    if LAUNCH_PDL:
        gdc_wait()

    x_ptr = qkv_ptr + seq * stride_qkv_row
    q = _transform_heads(
        x_ptr + head[:, None] * HEAD_DIM,
        dim[None, :],
        row_mask[:, None],
        query_norm_ptr,
        angles_ptr,
        eps,
        weight_offset,
        HEAD_DIM,
        HALF,
        HAS_NORM,
        HAS_ROPE,
    )
    q = to_operand(q.to(qkv_ptr.dtype.element_ty), k_ptr.dtype.element_ty)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), dtype=tl.float32)
    if begin < end:
        highest, total, acc = attend_tile(
            q, k, v, visible, highest, total, acc, scale, scale_out, HAS_SOFTCAP, PRECISION
        )
    for tile in range(begin + 1, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = key < newest
        next_page = page
        if ONE_PAGE:
            following = (tile + 1) * BLOCK_N // PAGE_SIZE
            next_page = tl.load(table_ptr + following, mask=tile + 1 < end, other=0)
        k, v = load_tile(
            k_ptr,
            v_ptr,
            table_ptr,
            page,
            key,
            visible,
            kv_head,
            dim,
            NUM_KV_HEADS,
            HEAD_DIM,
            PADDED_DIM,
            PAGE_SIZE,
            ONE_PAGE,
        )
        page = next_page
        highest, total, acc = attend_tile(
            q, k, v, visible, highest, total, acc, scale, scale_out, HAS_SOFTCAP, PRECISION
        )

    if (split == NUM_SPLITS - 1) & (seq_len > 0):
        x_ptr += (NUM_KV_HEADS * GROUP + kv_head) * HEAD_DIM
        new_k = _transform_heads(
            x_ptr + tl.zeros((1, 1), dtype=tl.int32),
            dim[None, :],
            tl.full((1, 1), True, tl.int1),
            key_norm_ptr,
            angles_ptr,
            eps,
            weight_offset,
            HEAD_DIM,
            HALF,
            HAS_NORM,
            HAS_ROPE,
        )
        new_v = tl.load(x_ptr + NUM_KV_HEADS * HEAD_DIM + dim[None, :], mask=kv_dim, other=0.0)
        new_k = to_cache(new_k, k_ptr.dtype.element_ty)
        new_v = to_cache(new_v.to(tl.float32), v_ptr.dtype.element_ty)
        if new_slot >= 0:
            new_row = (new_slot // PAGE_SIZE * NUM_KV_HEADS + kv_head) * PAGE_SIZE
            target = (new_row + new_slot % PAGE_SIZE) * HEAD_DIM + dim[None, :]
            tl.store(k_ptr + target, new_k, mask=kv_dim)
            tl.store(v_ptr + target, new_v, mask=kv_dim)
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
        if HAS_SOFTCAP:
            score = scale_out * tanh(score)
        new_highest = tl.maximum(highest, score)
        decay = tl.exp2(highest - new_highest)
        probability = tl.exp2(score - new_highest)
        total = total * decay + probability
        acc = acc * decay[:, None] + probability[:, None] * new_v.to(tl.float32)
        highest = new_highest

    out_row = (seq * (NUM_KV_HEADS * GROUP) + head) * NUM_SPLITS + split
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & kv_dim)
    if NUM_SPLITS > 1:
        # log2(0) is minus infinity: an empty split has no weight.
        tl.store(lse_ptr + out_row, highest + tl.log2(total), mask=row_mask)
