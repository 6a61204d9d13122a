"""A program for each row; in `fill_last_tokens` one for many tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.decode_state import BAD_LOGITS, NUM_COLUMNS, DecodeInputs, DecodeState

_BAD_LOGITS = tl.constexpr(BAD_LOGITS)
_BLOCK = 128  # entries of a block table at a time
_TOKENS = 1024


@triton.jit
def _start_rows_kernel(
    columns_ptr: tl.tensor,  # [N, NUM_COLUMNS + NUM_STOP_IDS] int64
    last_token_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    max_tokens_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    stop_ids_ptr: tl.tensor,  # [num_rows, NUM_STOP_IDS] int64
    is_active_ptr: tl.tensor,
    generated_ptr: tl.tensor,  # [num_rows, RING] int64
    NUM_COLUMNS: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    PADDED_STOP_IDS: tl.constexpr,
    RING: tl.constexpr,
    PADDED_RING: tl.constexpr,
) -> None:
    columns_ptr += tl.program_id(0) * (NUM_COLUMNS + NUM_STOP_IDS)
    row = tl.load(columns_ptr)
    tl.store(last_token_ptr + row, tl.load(columns_ptr + 1))
    num_tokens = tl.load(columns_ptr + 2).to(tl.int32)
    max_tokens = tl.load(columns_ptr + 3).to(tl.int32)
    tl.store(num_tokens_ptr + row, num_tokens)
    tl.store(max_tokens_ptr + row, max_tokens)
    tl.store(is_active_ptr + row, (num_tokens < max_tokens).to(tl.int32))
    tl.store(top_k_ptr + row, tl.load(columns_ptr + 4).to(tl.int32))
    tl.store(seeds_ptr + row, tl.load(columns_ptr + 5))
    bits = tl.load(columns_ptr + 6).to(tl.int32)
    tl.store(temperature_ptr + row, bits.to(tl.float32, bitcast=True))
    bits = tl.load(columns_ptr + 7).to(tl.int32)
    tl.store(top_p_ptr + row, bits.to(tl.float32, bitcast=True))
    bits = tl.load(columns_ptr + 8).to(tl.int32)
    tl.store(min_p_ptr + row, bits.to(tl.float32, bitcast=True))
    stop = tl.arange(0, PADDED_STOP_IDS)
    mask = stop < NUM_STOP_IDS
    ids = tl.load(columns_ptr + NUM_COLUMNS + stop, mask=mask)
    tl.store(stop_ids_ptr + row * NUM_STOP_IDS + stop, ids, mask=mask)
    place = tl.arange(0, PADDED_RING)
    nothing = tl.full((PADDED_RING,), -1, tl.int64)
    tl.store(generated_ptr + row * RING + place, nothing, mask=place < RING)


def start_rows(state: DecodeState, columns: Tensor) -> None:
    """See `nbllm_kernels.start_rows`."""
    num_stop_ids, ring = state.stop_ids.shape[1], state.generated.shape[1]
    _start_rows_kernel[(columns.shape[0],)](
        columns,
        state.last_token,
        state.num_tokens,
        state.max_tokens,
        state.top_k,
        state.seeds,
        state.temperature,
        state.top_p,
        state.min_p,
        state.stop_ids,
        state.is_active,
        state.generated,
        NUM_COLUMNS=NUM_COLUMNS,
        NUM_STOP_IDS=num_stop_ids,
        PADDED_STOP_IDS=triton.next_power_of_2(num_stop_ids),
        RING=ring,
        PADDED_RING=triton.next_power_of_2(ring),
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit
def _decode_inputs_kernel(
    rows_ptr: tl.tensor,  # [N] int64
    last_token_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    is_active_ptr: tl.tensor,
    tables_ptr: tl.tensor,  # [num_rows, max_blocks] int32
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    input_ids_ptr: tl.tensor,  # from here on outputs, [N]
    positions_ptr: tl.tensor,
    next_positions_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    out_tables_ptr: tl.tensor,  # [N, max_blocks] int32
    out_temperature_ptr: tl.tensor,
    out_top_p_ptr: tl.tensor,
    out_min_p_ptr: tl.tensor,
    out_top_k_ptr: tl.tensor,
    out_seeds_ptr: tl.tensor,
    MAX_BLOCKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    is_active = tl.load(is_active_ptr + row) != 0
    num_tokens = tl.where(is_active, tl.load(num_tokens_ptr + row), 0)
    position = tl.maximum(num_tokens - 1, 0)
    page = tl.load(tables_ptr + row * MAX_BLOCKS + position // PAGE_SIZE).to(tl.int64)
    slot = tl.where(is_active, page * PAGE_SIZE + position % PAGE_SIZE, -1)
    tl.store(input_ids_ptr + index, tl.load(last_token_ptr + row))
    tl.store(positions_ptr + index, position.to(tl.int64))
    tl.store(next_positions_ptr + index, num_tokens.to(tl.int64))
    tl.store(seq_lens_ptr + index, num_tokens)
    tl.store(slots_ptr + index, slot)
    tl.store(out_temperature_ptr + index, tl.load(temperature_ptr + row))
    tl.store(out_top_p_ptr + index, tl.load(top_p_ptr + row))
    tl.store(out_min_p_ptr + index, tl.load(min_p_ptr + row))
    tl.store(out_top_k_ptr + index, tl.load(top_k_ptr + row))
    tl.store(out_seeds_ptr + index, tl.load(seeds_ptr + row))
    num_blocks = tl.cdiv(num_tokens, PAGE_SIZE)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        mask = block < num_blocks
        pages = tl.load(tables_ptr + row * MAX_BLOCKS + block, mask=mask)
        tl.store(out_tables_ptr + index.to(tl.int64) * MAX_BLOCKS + block, pages, mask=mask)


def decode_inputs(
    state: DecodeState, rows: Tensor, inputs: DecodeInputs, *, block_size: int
) -> None:
    """See `nbllm_kernels.decode_inputs`."""
    _decode_inputs_kernel[(rows.shape[0],)](
        rows,
        state.last_token,
        state.num_tokens,
        state.is_active,
        state.block_tables,
        state.temperature,
        state.top_p,
        state.min_p,
        state.top_k,
        state.seeds,
        inputs.input_ids,
        inputs.positions,
        inputs.next_positions,
        inputs.seq_lens,
        inputs.slot_mapping,
        inputs.block_tables,
        inputs.temperature,
        inputs.top_p,
        inputs.min_p,
        inputs.top_k,
        inputs.seeds,
        MAX_BLOCKS=state.block_tables.shape[1],
        PAGE_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit
def _append_tokens_kernel(
    rows_ptr: tl.tensor,  # [N] int64
    token_ids_ptr: tl.tensor,  # [N] int64
    last_token_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    max_tokens_ptr: tl.tensor,
    is_active_ptr: tl.tensor,
    stop_ids_ptr: tl.tensor,  # [num_rows, NUM_STOP_IDS] int64
    generated_ptr: tl.tensor,  # [num_rows, RING] int64
    NUM_STOP_IDS: tl.constexpr,
    PADDED_STOP_IDS: tl.constexpr,
    RING: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    if tl.load(is_active_ptr + row) == 0:
        return
    token = tl.load(token_ids_ptr + index)
    position = tl.load(num_tokens_ptr + row)
    is_bad = token < 0
    token = tl.where(is_bad, _BAD_LOGITS, token)
    entry = position.to(tl.int64) * 4294967296 + token
    tl.store(generated_ptr + row * RING + position % RING, entry)
    stop = tl.arange(0, PADDED_STOP_IDS)
    stop_ids = tl.load(stop_ids_ptr + row * NUM_STOP_IDS + stop, mask=stop < NUM_STOP_IDS, other=-1)
    is_stop = tl.max((stop_ids == token).to(tl.int32), axis=0) != 0
    ends = is_bad | is_stop | (position + 1 >= tl.load(max_tokens_ptr + row))
    tl.store(last_token_ptr + row, tl.where(is_bad, 0, token))
    tl.store(num_tokens_ptr + row, position + 1)
    tl.store(is_active_ptr + row, tl.where(ends, 0, 1))


def append_tokens(state: DecodeState, rows: Tensor, token_ids: Tensor) -> None:
    """See `nbllm_kernels.append_tokens`."""
    if rows.shape[0] == 0:
        return
    num_stop_ids = state.stop_ids.shape[1]
    _append_tokens_kernel[(rows.shape[0],)](
        rows,
        token_ids,
        state.last_token,
        state.num_tokens,
        state.max_tokens,
        state.is_active,
        state.stop_ids,
        state.generated,
        NUM_STOP_IDS=num_stop_ids,
        PADDED_STOP_IDS=triton.next_power_of_2(num_stop_ids),
        RING=state.generated.shape[1],
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit
def _fill_last_tokens_kernel(
    input_ids_ptr: tl.tensor,  # [num_tokens] int64
    last_token_ptr: tl.tensor,
    num_tokens: tl.tensor,
    TOKENS: tl.constexpr,
) -> None:
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(input_ids_ptr + index, mask=index < num_tokens, other=0)
    unknown = token < 0
    token = tl.load(last_token_ptr + (-1 - token), mask=unknown)
    tl.store(input_ids_ptr + index, token, mask=unknown)


def fill_last_tokens(state: DecodeState, input_ids: Tensor) -> None:
    """See `nbllm_kernels.fill_last_tokens`."""
    num_tokens = input_ids.shape[0]
    _fill_last_tokens_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
        input_ids, state.last_token, num_tokens, TOKENS=_TOKENS, num_warps=4, enable_fp_fusion=True
    )
