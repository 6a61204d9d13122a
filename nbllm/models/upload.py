"""Upload: tensors of a checkpoint on their way into a model's parameters.

To a GPU they go in pieces through two buffers of pinned memory: while one piece travels, the next
is read from its file and converted. Whether the numbers are finite is asked of the device when all
are there, so that nothing waits in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbllm.errors import ModelLoadError

_PIECE_BYTES = 64 * 1024**2
_NUM_PIECES = 2
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Upload:
    """Copies tensors, one at a time.

    Args:
        device: of the parameters.
        is_staged: copy in pieces through buffers; default: on a GPU.
        piece_bytes: size of a buffer.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        is_staged: bool | None = None,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._is_staged = on_gpu if is_staged is None else is_staged
        self._piece_bytes = piece_bytes
        self._pins = on_gpu
        self._pieces: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_PIECES  # since when it is free
        self._next = 0
        self._extremes: list[Tensor] = []
        self._places: list[str] = []

    def copy(self, source: Tensor, destination: Tensor, where: str) -> None:
        """Start to copy a tensor.

        Args:
            source: on the CPU, maybe mapped from a file.
            destination: a parameter or rows of one, overwritten.
            where: what messages call the source.

        Raises:
            ModelLoadError: the source has another shape, or a dtype that is not read.
        """
        if source.dtype not in _DTYPES:
            raise ModelLoadError(
                f"{where}: dtype {source.dtype} is not supported (float32, float16, bfloat16 are)"
            )
        if destination.shape != source.shape:
            raise ModelLoadError(
                f"{where}: shape {tuple(source.shape)}, "
                f"and config.json says {tuple(destination.shape)}"
            )
        if self._is_staged and source.is_contiguous() and destination.is_contiguous():
            self._copy_in_pieces(source.view(-1), destination.view(-1))
        else:
            destination.copy_(source)
        # Both ends are NaN if anything is; one pass, twenty times as fast as isfinite().
        self._extremes.append(torch.stack(destination.aminmax()).float())
        self._places.append(f"{where}: contains NaN or infinity in {destination.dtype}")

    def finish(self) -> None:
        """Wait for all copies.

        Raises:
            ModelLoadError: a tensor holds NaN or infinity; names the first.
        """
        if not self._extremes:
            return
        is_finite = torch.isfinite(torch.stack(self._extremes)).all(dim=1).tolist()
        self._pieces.clear()
        if self._pins and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()  # or PyTorch keeps the pinned memory for ever
        for place, ok in zip(self._places, is_finite, strict=True):
            if not ok:
                raise ModelLoadError(place)

    def _copy_in_pieces(self, source: Tensor, destination: Tensor) -> None:
        if not self._pieces:
            self._pieces = [
                torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=self._pins)
                for _ in range(_NUM_PIECES)
            ]
        size = self._piece_bytes // destination.dtype.itemsize
        for part, target in zip(source.split(size), destination.split(size), strict=True):
            number, self._next = self._next, (self._next + 1) % _NUM_PIECES
            copied = self._copied[number]
            if copied is not None:
                copied.synchronize()
            piece = self._pieces[number].view(destination.dtype)[: len(part)]
            piece.copy_(part)
            target.copy_(piece, non_blocking=True)
            if self._pins:
                self._copied[number] = event = torch.cuda.Event()
                event.record()
