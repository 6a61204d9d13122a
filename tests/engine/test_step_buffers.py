"""StepBuffers: what is sent arrives, and what pads it belongs to nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbllm.engine.step_buffers import StepBuffers, StepSize

ARRAYS = {
    "input_ids": np.array([5, 6, 7, 8, 9]),
    "positions": np.array([3, 0, 1, 2, 3]),
    "slot_mapping": np.array([19, 8, 9, 10, 11]),
    "sampled_rows": np.array([4, 2]),
    "logits_indices": np.array([0, 4]),
    "prompt_lens": np.array([4, 4]),
    "query_start_loc": np.array([0, 1, 5]),
    "seq_lens": np.array([4, 4]),
    "block_tables": np.array([[2, 7], [1, 9]]),
}


@pytest.mark.parametrize("size", [StepSize(5, 2, 2, 2), StepSize(16, 3, 4, 5)])
def test_a_step_arrives_as_it_is_whatever_the_room(size: StepSize) -> None:
    buffers = StepBuffers(size, torch.device("cpu"))
    for _ in range(2):  # what an earlier step left behind makes no difference
        buffers.send(ARRAYS, null_row=99)
        for name, array in ARRAYS.items():
            tensor = buffers[name]
            assert tensor.data_ptr() % 16 == 0
            if array.ndim == 2:
                assert tensor[: len(array), : array.shape[1]].tolist() == array.tolist()
            else:
                assert tensor[: len(array)].tolist() == array.tolist()
        for tensor in buffers.tensors.values():
            tensor += 1000


def test_padding_has_no_slot_no_tokens_and_no_row() -> None:
    buffers = StepBuffers(StepSize(7, 4, 3, 2), torch.device("cpu"))
    buffers.send(ARRAYS, null_row=99)
    assert buffers["slot_mapping"].tolist() == [19, 8, 9, 10, 11, -1, -1]
    assert buffers["query_start_loc"].tolist() == [0, 1, 5, 5, 5]
    assert buffers["seq_lens"].tolist() == [4, 4, 0, 0]
    assert buffers["sampled_rows"].tolist() == [4, 2, 99]
    assert buffers["logits_indices"].tolist() == [0, 4, 0]
    assert buffers["block_tables"].tolist() == [[2, 7], [1, 9], [0, 0], [0, 0]]
