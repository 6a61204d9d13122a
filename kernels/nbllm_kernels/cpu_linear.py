"""Products of few rows on the CPU, in C, see `cpu_native`."""

from __future__ import annotations

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
    num_rows, in_features = x.shape
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(num_rows, out_features)
    library.multiply_packed(
        out.data_ptr(),
        x.data_ptr(),
        blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        num_rows,
        in_features,
        out_features,
        blocks.shape[2],
        torch.get_num_threads(),
    )
    return out


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
    num_rows, in_features = x.shape
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(num_rows, weight.shape[0])
    library.multiply_rows(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        num_rows,
        in_features,
        weight.shape[0],
        cpu_native.IS_BF16[x.dtype],
        torch.get_num_threads(),
    )
    return out


def _fits(added: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    return added.dtype == x.dtype and added.shape == shape
