"""StepBuffers: all that the host says of a step, in one piece of memory and one copy.

The numbers of a step (token ids, positions, slots, lengths, block tables) are computed by NumPy in
pinned memory and sent together; the tensors that the model and the kernels take are views of the
copy. The same layout serves a step of its own size and the padded one of a captured graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nbllm_kernels import AttentionMetadata

_ALIGNMENT = 16  # bytes: kernels are compiled anew for pointers that are not
_FIELDS = {  # name -> bytes of a number
    "input_ids": 8,
    "positions": 8,
    "slot_mapping": 8,
    "sampled_rows": 8,
    "logits_indices": 8,
    "prompt_lens": 8,
    "query_start_loc": 4,
    "seq_lens": 4,
    "block_tables": 4,
}


@dataclass(frozen=True, slots=True)
class StepSize:
    """Room for a step.

    Attributes:
        num_tokens, num_seqs, num_sampled: as in the step, or more.
        num_blocks: columns of the block tables.
    """

    num_tokens: int
    num_seqs: int
    num_sampled: int
    num_blocks: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each field."""
        return {
            "input_ids": (self.num_tokens,),
            "positions": (self.num_tokens,),
            "slot_mapping": (self.num_tokens,),
            "sampled_rows": (self.num_sampled,),
            "logits_indices": (self.num_sampled,),
            "prompt_lens": (self.num_seqs,),
            "query_start_loc": (self.num_seqs + 1,),
            "seq_lens": (self.num_seqs,),
            "block_tables": (self.num_seqs, self.num_blocks),
        }


class StepBuffers:
    """The tensors of a step on the device.

    Args:
        size: room for it.
        device: where it runs.
    """

    def __init__(self, size: StepSize, device: torch.device) -> None:
        self.size = size
        self._offsets: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, shape in size.shapes().items():
            end = offset + int(np.prod(shape)) * _FIELDS[name]
            self._offsets[name] = (offset, end)
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.empty(offset, dtype=torch.uint8, device=device)
        self.tensors: dict[str, Tensor] = {
            name: self._memory[begin:end]
            .view(torch.int64 if _FIELDS[name] == 8 else torch.int32)
            .view(size.shapes()[name])
            for name, (begin, end) in self._offsets.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def send(self, arrays: dict[str, np.ndarray], null_row: int) -> None:
        """Copy a step in, padded to the size of the buffers.

        Padding tokens belong to no sequence and have no slot, padding sequences no tokens, and
        padding samples go to `null_row`.

        Args:
            arrays: a number for each token, sequence or sample, by field.
            null_row: the row that belongs to nobody.
        """
        on_gpu = self._memory.device.type == "cuda"
        host = torch.empty(self._memory.shape, dtype=torch.uint8, pin_memory=on_gpu)
        memory = host.numpy()
        padding = {"slot_mapping": -1, "sampled_rows": null_row}
        for name, (begin, end) in self._offsets.items():
            field = memory[begin:end].view(np.int64 if _FIELDS[name] == 8 else np.int32)
            field = field.reshape(self.size.shapes()[name])
            array = arrays[name]
            if field.ndim == 2:
                field[: len(array), : array.shape[1]] = array
                field[len(array) :] = 0
                continue
            field[: len(array)] = array
            if name == "query_start_loc":
                field[len(array) :] = array[-1]
            else:
                field[len(array) :] = padding.get(name, 0)
        self._memory.copy_(host, non_blocking=True)

    def metadata(
        self,
        *,
        max_query_len: int,
        max_seq_len: int,
        num_decode_seqs: int,
        batch_invariant: bool,
        has_prompt_lens: bool,
    ) -> AttentionMetadata:
        """The step as the attention kernels take it."""
        return AttentionMetadata(
            query_start_loc=self["query_start_loc"],
            seq_lens=self["seq_lens"],
            block_tables=self["block_tables"],
            slot_mapping=self["slot_mapping"],
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            num_decode_seqs=num_decode_seqs,
            batch_invariant=batch_invariant,
            prompt_lens=self["prompt_lens"] if has_prompt_lens else None,
        )
