"""linear: y = x W^T + b, with the weight packed once where that is faster."""

from __future__ import annotations

from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from nbllm_kernels.dispatch import runs_triton

_TILE_ROWS = 16  # rows per matrix product in batch-invariant mode


class PackedWeight:
    """A [out_features, in_features] bfloat16 weight in the blocked layout of oneDNN (CPU).

    `F.linear` makes this layout anew on every call; packed once, the same product runs about
    twice as fast for few rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.nbytes = weight.nbytes
        with torch.no_grad():
            # 16 rows: the layout that serves decode batches; it is right for any number.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TILE_ROWS)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias for x [num_rows, in_features]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return output


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
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """x W^T + b.

    Args:
        x: [num_rows, in_features].
        weight: [out_features, in_features], plain or packed.
        bias: [out_features] or None.
        batch_invariant: a row's result does not depend on the other rows, bit for bit: rows go
            through products of one fixed shape.

    Returns:
        [num_rows, out_features].
    """
    if not batch_invariant:
        return _multiply(x, weight, bias)
    if runs_triton(x) and isinstance(weight, Tensor):
        from nbllm_kernels.gpu import matmul as gpu

        return gpu.matmul_batch_invariant(x, weight, bias)
    num_rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -num_rows % _TILE_ROWS))
    tiles = [_multiply(tile, weight, bias) for tile in padded.split(_TILE_ROWS)]
    return torch.cat(tiles)[:num_rows]


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, bias)
    return F.linear(x, weight, bias)
