"""Products with few rows of x: both kernels stream the weight once and are bound by its bytes.

`gemv_kernel` serves up to four rows. Its tile of the weight, all of the inner dimension if that
fits, goes to registers and is requested before `gdc_wait`, so that its latency overlaps the end of
the kernel before; products and sums are plain float32 instructions.

`skinny_matmul_kernel` serves up to sixteen on the tensor cores: the weight takes the long side of
the matrix instruction and the rows of x the short one. Its tiles come by a pipeline of
asynchronous copies, and before `gdc_wait` the first of them are fetched as far as the L2 cache.

Prologue: an RMSNorm of x. W (x g) and the sum of x^2 are accumulated side by side, and the row's
scale multiplies the result. Epilogues: bias, a residual to add to, or a gated activation. With a
gate the weight's first half are the gate's rows and its second half the ones of `up`; a program
takes them by turns, so that both halves of a pair end in the same thread's neighbourhood.

Both are long functions: what must stand before `gdc_wait` and what after it can be read off.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nbllm_kernels.gpu.activation import activate


@triton.jit
def _weight_rows(
    OUT_FEATURES: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr
) -> tl.tensor:
    """The rows of the weight that a program multiplies, [BLOCK_N]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        row = row // 2 + row % 2 * (OUT_FEATURES // 2)
    return row


@triton.jit
def _add_bias(
    y: tl.tensor, bias_ptr: tl.tensor, rows: tl.tensor, OUT_FEATURES: tl.constexpr
) -> tl.tensor:
    """y + bias, both [BLOCK_N]; or [BLOCK_N, 1] for rows of x side by side."""
    return y + tl.load(bias_ptr + rows, mask=rows < OUT_FEATURES, other=0.0).to(tl.float32)


@triton.jit
def load_tile(
    weight_row_ptr: tl.tensor,  # [BLOCK_N, 1, 1]
    row_mask: tl.tensor,
    group: tl.tensor,
    IN_FEATURES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, CHUNKS, BLOCK_K] of the weight.

    In this order the warps of a program divide the rows before they divide the inner dimension, so
    that most of a sum stays within a thread.
    """
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    k = (group * CHUNKS + chunk) * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    mask = row_mask & (k < IN_FEATURES)
    return tl.load(weight_row_ptr + k, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_vector(
    vector_ptr: tl.tensor,
    size: tl.tensor,
    group: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """[CHUNKS, BLOCK_K] float32 of a vector along the inner dimension."""
    k = group * CHUNKS * BLOCK_K + tl.arange(0, CHUNKS)[:, None] * BLOCK_K
    k += tl.arange(0, BLOCK_K)[None, :]
    return tl.load(vector_ptr + k, mask=k < size, other=0.0).to(tl.float32)


@triton.jit
def _store_row(
    y: tl.tensor,  # [BLOCK_N] float32
    residual: tl.tensor,  # [BLOCK_N], if HAS_RESIDUAL
    out_row_ptr: tl.tensor,
    num_columns: tl.tensor,  # OUT_FEATURES, or zero for a row that does not exist
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """The epilogue behind the bias, for one row of x."""
    dtype = out_row_ptr.dtype.element_ty
    if ACTIVATION == "none":
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_RESIDUAL:
            y += residual.to(tl.float32)
        tl.store(out_row_ptr + column, y.to(dtype), mask=column < num_columns)
    else:
        gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
        column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        y = activate(gate, ACTIVATION) * up
        tl.store(out_row_ptr + column, y.to(dtype), mask=column < num_columns // 2)


@triton.jit(do_not_specialize=["num_rows"])
def gemv_kernel(
    x_ptr: tl.tensor,  # [num_rows, IN_FEATURES]
    weight_ptr: tl.tensor,  # [OUT_FEATURES, IN_FEATURES]
    bias_ptr: tl.tensor,  # [OUT_FEATURES], if HAS_BIAS
    norm_weight_ptr: tl.tensor,  # [IN_FEATURES], if HAS_NORM
    out_ptr: tl.tensor,  # [num_rows, OUT_FEATURES, or half with a gate]; the residual if there is
    num_rows: tl.tensor,  # at most ROWS
    stride_x_row: tl.tensor,
    stride_weight_row: tl.tensor,
    stride_out_row: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,  # of the norm
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,  # one, unless NUM_GROUPS is one
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # of CHUNKS * BLOCK_K columns
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRIGGER_EARLY: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    rows = _weight_rows(OUT_FEATURES, BLOCK_N, ACTIVATION != "none")
    weight_row_ptr = weight_ptr + (rows.to(tl.int64) * stride_weight_row)[:, None, None]
    row_mask = (rows < OUT_FEATURES)[:, None, None]
    w = load_tile(weight_row_ptr, row_mask, 0, IN_FEATURES, CHUNKS, BLOCK_K)
    if HAS_NORM:
        g = load_vector(norm_weight_ptr, IN_FEATURES, 0, CHUNKS, BLOCK_K)
    if LAUNCH_PDL:
        if TRIGGER_EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not TRIGGER_EARLY:
            gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        # A row that does not exist has no columns.
        x_size = tl.where(row < num_rows, IN_FEATURES, 0)
        num_columns = tl.where(row < num_rows, OUT_FEATURES, 0)
        x_row_ptr = x_ptr + row * stride_x_row
        out_row_ptr = out_ptr + row * stride_out_row
        residual = rows
        if HAS_RESIDUAL:
            residual = tl.load(out_row_ptr + rows, mask=rows < num_columns, other=0.0)
        x = load_vector(x_row_ptr, x_size, 0, CHUNKS, BLOCK_K)
        square = x * x
        if HAS_NORM:
            x = x * (g + weight_offset)
        acc = tl.sum(w.to(tl.float32) * x[None, :, :], axis=1)  # [BLOCK_N, BLOCK_K]
        for group in range(1, NUM_GROUPS):
            w = load_tile(weight_row_ptr, row_mask, group, IN_FEATURES, CHUNKS, BLOCK_K)
            x = load_vector(x_row_ptr, x_size, group, CHUNKS, BLOCK_K)
            square += x * x
            if HAS_NORM:
                g = load_vector(norm_weight_ptr, IN_FEATURES, group, CHUNKS, BLOCK_K)
                x = x * (g + weight_offset)
            acc += tl.sum(w.to(tl.float32) * x[None, :, :], axis=1)
        y = tl.sum(acc, axis=1)
        if HAS_NORM:
            y = y * (1.0 / tl.sqrt_rn(tl.sum(tl.sum(square, axis=0), axis=0) / IN_FEATURES + eps))
        if HAS_BIAS:
            y = _add_bias(y, bias_ptr, rows, OUT_FEATURES)
        _store_row(
            y,
            residual,
            out_row_ptr,
            num_columns,
            BLOCK_N,
            ACTIVATION,
            HAS_RESIDUAL,
        )


@triton.jit
def _prefetch_weight(
    weight_row_ptr: tl.tensor,  # [BLOCK_N, 1]
    row_mask: tl.tensor,
    IN_FEATURES: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
) -> None:
    """Fetch the first lines (of 128 bytes) of each row into the L2 cache."""
    ELEMENTS: tl.constexpr = 128 * 8 // weight_row_ptr.dtype.element_ty.primitive_bitwidth
    k = tl.arange(0, PREFETCH_LINES)[None, :] * ELEMENTS
    # A line past the end is that of the first column instead.
    pointer = weight_row_ptr + tl.where(row_mask & (k < IN_FEATURES), k, 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointer.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _store_columns(
    y: tl.tensor,  # [BLOCK_N, BLOCK_M] float32: a column for each row of x
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    stride_out_row: tl.tensor,
    OUT_FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """The epilogue behind the bias, for all rows of x."""
    row = tl.arange(0, BLOCK_M)
    out_row_ptr = out_ptr + row[None, :] * stride_out_row
    dtype = out_ptr.dtype.element_ty
    if ACTIVATION == "none":
        column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        mask = (column < OUT_FEATURES) & (row < num_rows)[None, :]
        if HAS_RESIDUAL:
            y += tl.load(out_row_ptr + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_row_ptr + column, y.to(dtype), mask=mask)
    else:
        pairs = tl.permute(tl.reshape(y, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1))
        gate, up = tl.split(pairs)
        column = (tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2))[:, None]
        mask = (column < OUT_FEATURES // 2) & (row < num_rows)[None, :]
        y = activate(gate, ACTIVATION) * up
        tl.store(out_row_ptr + column, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_matmul_kernel(
    x_ptr: tl.tensor,  # as in gemv_kernel, to the norm's offset
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,  # at most BLOCK_M
    stride_x_row: tl.tensor,
    stride_weight_row: tl.tensor,
    stride_out_row: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # of BLOCK_K columns each, side by side on the warps of a program
    PREFETCH_LINES: tl.constexpr,
    NORM_FACTOR: tl.constexpr,  # of x g before it is rounded: float16 must not overflow
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRIGGER_EARLY: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
) -> None:
    rows = _weight_rows(OUT_FEATURES, BLOCK_N, ACTIVATION != "none")
    row = tl.arange(0, BLOCK_M)
    row_offset = tl.where(rows < OUT_FEATURES, rows, 0).to(tl.int64) * stride_weight_row
    if LAUNCH_PDL:
        if TRIGGER_EARLY:
            gdc_launch_dependents()
        if PREFETCH_LINES > 0:
            _prefetch_weight(
                weight_ptr + row_offset[:, None],
                (rows < OUT_FEATURES)[:, None],
                IN_FEATURES,
                PREFETCH_LINES,
            )
        gdc_wait()
        if not TRIGGER_EARLY:
            gdc_launch_dependents()
    STEP: tl.constexpr = SLICES * BLOCK_K
    slice_k = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    weight_row_ptr = weight_ptr + row_offset[None, :, None]
    x_row_ptr = x_ptr + (tl.where(row < num_rows, row, 0) * stride_x_row)[None, :, None]
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), dtype=tl.float32)
    square = tl.zeros((SLICES, BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, IN_FEATURES, STEP):
        k = start + slice_k
        if IN_FEATURES % STEP == 0:
            w = tl.load(weight_row_ptr + k)
            x = tl.load(x_row_ptr + k)
        else:
            w = tl.load(weight_row_ptr + k, mask=k < IN_FEATURES, other=0.0)
            x = tl.load(x_row_ptr + k, mask=k < IN_FEATURES, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            square += wide * wide
            g = tl.load(norm_weight_ptr + k, mask=k < IN_FEATURES, other=0.0).to(tl.float32)
            x = (wide * ((g + weight_offset) * NORM_FACTOR)).to(x.dtype)
        if SLICES == 1:
            w = tl.reshape(w, (BLOCK_N, BLOCK_K))
            x = tl.reshape(x, (BLOCK_M, BLOCK_K))
            product = tl.dot(w, tl.trans(x), tl.reshape(acc, (BLOCK_N, BLOCK_M)))
            acc = tl.reshape(product, (1, BLOCK_N, BLOCK_M))
        else:
            acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc)
    y = tl.sum(acc, axis=0)
    if HAS_NORM:
        mean_square = tl.sum(tl.sum(square, axis=0), axis=1) / IN_FEATURES
        y = y * ((1.0 / NORM_FACTOR) / tl.sqrt_rn(mean_square + eps))[None, :]
    if HAS_BIAS:
        y = _add_bias(y, bias_ptr, rows[:, None], OUT_FEATURES)
    _store_columns(
        y,
        out_ptr,
        num_rows,
        stride_out_row,
        OUT_FEATURES,
        BLOCK_N,
        BLOCK_M,
        ACTIVATION,
        HAS_RESIDUAL,
    )
