"""Products of few rows on the CPU, in C, see `cpu_native`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nbllm_kernels import cpu_native

_MAX_PACKED_ROWS = 4
_MAX_ROWS = 8  # of a product with a plain weight


def takes_packed(x: Tensor, blocks: Tensor) -> bool:
    """Whether `multiply_packed` runs: for more rows, oneDNN is faster."""
    return (
        cpu_native.library is not None
        and 1 <= x.shape[0] <= _MAX_PACKED_ROWS
        and x.dtype == torch.bfloat16
        and x.shape[1] == 2 * blocks.shape[1]
    )


def multiply_packed(
    x: Tensor, blocks: Tensor, out_features: int, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x @ weight.T + bias + residual, bfloat16.

    Args:
        x: [num_rows, in_features].
        blocks: the weight, [row blocks, in_features / 2, rows of a block, 2].
        out_features: the last block may have more rows.
        bias, residual: [out_features] and [num_rows, out_features], bfloat16, or None.
    """
    library = cpu_native.library
    assert library is not None
    row_block = blocks.shape[2]
    return _multiply(library.multiply_packed, x, blocks, out_features, bias, residual, row_block)


def takes_rows(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether `multiply_rows` runs: for more rows, PyTorch's product is faster."""
    return (
        x.shape[0] <= _MAX_ROWS
        and cpu_native.is_row_of_vectors(x, 1)
        and weight.dtype == x.dtype
        and weight.shape[1:] == x.shape[1:]
        and weight.is_contiguous()
        and (bias is None or _fits(bias, x, (len(weight),)))
        and (residual is None or _fits(residual, x, (len(x), len(weight))))
    )


def multiply_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x @ weight.T + bias + residual, see `nbllm_kernels.linear`; sums are float32.

    A row's result does not depend on the other rows, bit for bit.
    """
    library = cpu_native.library
    assert library is not None
    is_bf16 = cpu_native.IS_BF16[x.dtype]
    return _multiply(library.multiply_rows, x, weight, len(weight), bias, residual, is_bf16)


def _multiply(
    product: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: int,
) -> Tensor:
    """Call a function of linear.c; `kind` is the argument that they differ in."""
    x = x.contiguous()  # held here: C gets addresses
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    out = x.new_empty(len(x), out_features)
    tensors = (out, x, weight, bias, residual)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    product(*addresses, *x.shape, out_features, kind, torch.get_num_threads())
    return out


def _fits(added: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    return added.dtype == x.dtype and added.shape == shape
