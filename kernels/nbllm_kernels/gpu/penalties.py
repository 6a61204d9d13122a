"""apply_penalties: a program for each row and tile of the vocabulary. count_tokens: one a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbllm_kernels.gpu.validation import require_float, require_index
from nbllm_kernels.penalties import MAX_COUNT, Penalties

_BLOCK = 4096  # ids at a time
_MAX_COUNT = tl.constexpr(MAX_COUNT)


@triton.jit
def _apply_penalties_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB_SIZE]
    rows_ptr: tl.tensor,  # [N] int64
    occurrences_ptr: tl.tensor,  # [num_rows, VOCAB_SIZE] int16
    presence_ptr: tl.tensor,  # [num_rows] float32
    frequency_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [N, VOCAB_SIZE] float32
    stride_logits: tl.tensor,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < VOCAB_SIZE
    row = tl.load(rows_ptr + index)
    x = tl.load(logits_ptr + index * stride_logits + ids, mask=mask).to(tl.float32)
    occurred = tl.load(occurrences_ptr + row * VOCAB_SIZE + ids, mask=mask, other=0).to(tl.int32)
    count = occurred & _MAX_COUNT
    repetition = tl.load(repetition_ptr + row)
    repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
    x = tl.where(occurred != 0, repeated, x)
    x -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    x -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(out_ptr + index * VOCAB_SIZE + ids, x, mask=mask)


def apply_penalties(logits: Tensor, rows: Tensor, penalties: Penalties) -> Tensor:
    """See `nbllm_kernels.apply_penalties`.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
    """
    require_float("logits", logits, 2)
    num_rows, vocab_size = logits.shape
    _check(penalties, vocab_size, logits.device)
    require_index("rows", rows, (num_rows,), torch.int64, logits.device)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if num_rows:
        _apply_penalties_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits,
            rows,
            penalties.occurrences,
            penalties.presence,
            penalties.frequency,
            penalties.repetition,
            out,
            logits.stride(0),
            VOCAB_SIZE=vocab_size,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def _count_tokens_kernel(
    rows_ptr: tl.tensor,  # [N] int64
    token_ids_ptr: tl.tensor,  # [N] int64
    occurrences_ptr: tl.tensor,  # [num_rows, VOCAB_SIZE] int16
    VOCAB_SIZE: tl.constexpr,
) -> None:
    row = tl.load(rows_ptr + tl.program_id(0))
    token = tl.load(token_ids_ptr + tl.program_id(0))
    if token < 0:
        return
    pointer = occurrences_ptr + row * VOCAB_SIZE + token
    occurred = tl.load(pointer)
    is_full = (occurred & _MAX_COUNT) == _MAX_COUNT
    tl.store(pointer, tl.where(is_full, occurred, occurred + 1))


def count_tokens(penalties: Penalties, rows: Tensor, token_ids: Tensor) -> None:
    """See `nbllm_kernels.count_tokens`.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
    """
    num_rows, vocab_size = rows.shape[0], penalties.occurrences.shape[1]
    _check(penalties, vocab_size, rows.device)
    require_index("rows", rows, (num_rows,), torch.int64, rows.device)
    require_index("token_ids", token_ids, (num_rows,), torch.int64, rows.device)
    if num_rows:
        _count_tokens_kernel[(num_rows,)](
            rows,
            token_ids,
            penalties.occurrences,
            VOCAB_SIZE=vocab_size,
            num_warps=1,
            enable_fp_fusion=True,
        )


def _check(penalties: Penalties, vocab_size: int, device: torch.device) -> None:
    num_rows = penalties.occurrences.shape[0]
    shape = (num_rows, vocab_size)
    require_index("occurrences", penalties.occurrences, shape, torch.int16, device)
    for name in ("presence", "frequency", "repetition"):
        require_index(name, getattr(penalties, name), (num_rows,), torch.float32, device)
