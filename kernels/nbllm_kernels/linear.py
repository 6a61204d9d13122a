"""linear: y = x W^T + b, with the weight packed once where that is faster."""

from __future__ import annotations

import ctypes
import sys
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm_kernels import cpu_linear
from nbllm_kernels.dispatch import runs_triton

_TILE_ROWS = 16  # rows per matrix product in batch-invariant mode
_FASTEST_ROWS = 4  # one packed product of four rows takes less time than one of one row
_HUGE_PAGE = 2 * 1024**2
_MADV_COLLAPSE = 25  # of <linux/mman.h>, since Linux 6.1
_ROW_BLOCK_SIZES = (64, 48, 32, 16)  # of oneDNN's layouts for AVX-512 and AMX


class PackedWeight:
    """A [out_features, in_features] bfloat16 weight in the blocked layout of oneDNN (CPU).

    `F.linear` makes this layout anew on every call; packed once, the same product runs about
    twice as fast for few rows.

    Attributes:
        has_rows: whether `rows` works here: the layout is oneDNN's own business, and was
            recognized.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.nbytes = weight.nbytes
        with torch.no_grad():
            # 16 rows: the layout that serves decode batches; it is right for any number.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TILE_ROWS)
        memory = _memory_of(self._packed)
        self._blocks = None if memory is None else _find_row_blocks(memory, weight)

    @property
    def has_rows(self) -> bool:
        return self._blocks is not None

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias + residual for x [num_rows, in_features]."""
        num_rows = x.shape[0]
        if self._blocks is not None and cpu_linear.takes_packed(x, self._blocks):
            return cpu_linear.multiply_packed(x, self._blocks, self.shape[0], bias, residual)
        padding = max(_FASTEST_ROWS - num_rows, 0)
        if padding:
            x = F.pad(x, (0, 0, 0, padding))
            residual = F.pad(residual, (0, 0, 0, padding)) if residual is not None else None
        product = torch.ops.mkldnn._linear_pointwise
        output: Tensor
        if residual is None:
            output = product(x, self._packed, bias, "none", [], "")
        else:
            output = product.binary(x, residual, self._packed, bias, "add")
        return output[:num_rows] if padding else output

    def rows(self, index: Tensor) -> Tensor:
        """weight[index] for index [N] int64: a table of embeddings that is a matrix, too."""
        assert self._blocks is not None
        block_size = self._blocks.shape[2]
        picked = self._blocks[index // block_size, :, index % block_size]
        return picked.flatten(1)


def _memory_of(packed: Tensor) -> Tensor | None:
    """The numbers of a packed weight as they lie, [N] bfloat16, in huge pages if there are any."""
    operators = torch.ops.mkldnn
    if not hasattr(operators, "data_ptr") or not hasattr(operators, "_nbytes"):
        return None
    address, num_bytes = operators.data_ptr(packed), operators._nbytes(packed)
    _use_huge_pages(address, num_bytes)
    memory = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def _use_huge_pages(address: int, num_bytes: int) -> None:
    """Move memory to pages of 2 MiB: to stream it takes a tenth less time. Advice, which an older
    Linux, or one without free huge pages, does not take."""
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    stop = (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE
    if sys.platform == "linux" and start < stop:
        size = ctypes.c_size_t(stop - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, _MADV_COLLAPSE)


def _find_row_blocks(numbers: Tensor, weight: Tensor) -> Tensor | None:
    """The packed numbers as [row blocks, in_features / 2, rows of a block, 2], if that is how they
    lie.

    bfloat16 products take pairs of the inner dimension, for a register's worth of rows at a time.
    The guess is checked against the weight: one row of each block.
    """
    num_rows, num_columns = weight.shape
    if num_columns % 2:
        return None
    for block_size in _ROW_BLOCK_SIZES:
        if numbers.numel() % (num_columns * block_size) or numbers.numel() < weight.numel():
            continue
        blocks = numbers.view(-1, num_columns // 2, block_size, 2)
        rows = torch.arange(0, num_rows, block_size + 1)
        if torch.equal(blocks[rows // block_size, :, rows % block_size].flatten(1), weight[rows]):
            return blocks
    return None


Weight = Union[Tensor, PackedWeight]


def can_pack(weight: Tensor) -> bool:
    """True if packing is possible for this tensor and pays on this machine."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_weight(weight: Tensor) -> Weight:
    """Pack a weight if that pays; the caller drops the plain one."""
    return PackedWeight(weight) if can_pack(weight) else weight


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """x W^T + b, added to a residual if there is one.

    Args:
        x: [num_rows, in_features].
        weight: [out_features, in_features], plain or packed.
        bias: [out_features] or None.
        residual: [num_rows, out_features] or None; may be overwritten.
        batch_invariant: a row's result does not depend on the other rows, bit for bit: rows go
            through products of one fixed shape.

    Returns:
        [num_rows, out_features].
    """
    if batch_invariant:
        product = _multiply_batch_invariant(x, weight, bias)
        return product if residual is None else residual.add_(product)
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, bias, residual)
    if runs_triton(x):
        from nbllm_kernels.gpu import skinny_linear as gpu

        if gpu.can_multiply(x, weight):
            return gpu.skinny_linear(x, weight, bias, residual=residual)
    elif cpu_linear.takes_rows(x, weight, bias, residual):
        return cpu_linear.multiply_rows(x, weight, bias, residual)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is None and runs_triton(x):
        return residual.addmm_(x, weight.t())
    return residual.add_(F.linear(x, weight, bias))


def _multiply_batch_invariant(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor) and runs_triton(x):
        from nbllm_kernels.gpu import matmul as gpu

        return gpu.matmul_batch_invariant(x, weight, bias)
    num_rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -num_rows % _TILE_ROWS))
    tiles = [linear(tile, weight, bias) for tile in padded.split(_TILE_ROWS)]
    return torch.cat(tiles)[:num_rows]
