"""The ops of the loop on the device, against the reference step by step."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nbllm_kernels import BAD_LOGITS, DecodeInputs, DecodeState, reference

NUM_ROWS, MAX_BLOCKS, BLOCK_SIZE, RING = 6, 300, 4, 16


def make_state(seed: int) -> DecodeState:
    """Sequences of all lengths, some of them ended; the last row is nobody's."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        numbers = torch.randint(0, high, (NUM_ROWS + 1, *shape), generator=generator)
        return numbers.to(dtype)

    num_tokens = random(MAX_BLOCKS * BLOCK_SIZE - RING, dtype=torch.int32) + 1
    is_active = (random(4) > 0).to(torch.int32)
    is_active[-1] = 0
    return DecodeState(
        last_token=random(9),
        num_tokens=num_tokens,
        max_tokens=num_tokens + random(6, dtype=torch.int32) + 1,
        is_active=is_active,
        stop_ids=torch.where(random(3, 3) > 0, -1, random(9, 3)),
        block_tables=random(1000, MAX_BLOCKS, dtype=torch.int32),
        temperature=random(3).float(),
        top_p=random(2).float() / 2 + 0.5,
        min_p=random(2).float() / 3,
        top_k=random(50, dtype=torch.int32),
        seeds=random(1 << 62) - (1 << 61),
        generated=torch.full((NUM_ROWS + 1, RING), -1),
    )


def make_inputs(size: int, device: torch.device) -> DecodeInputs:
    """Buffers that hold no meaningful number."""

    def filled(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full((size, *shape), 77, dtype=dtype, device=device)

    return DecodeInputs(
        input_ids=filled(torch.int64),
        positions=filled(torch.int64),
        next_positions=filled(torch.int64),
        seq_lens=filled(torch.int32),
        slot_mapping=filled(torch.int64),
        block_tables=filled(torch.int32, MAX_BLOCKS),
        temperature=filled(torch.float32),
        top_p=filled(torch.float32),
        min_p=filled(torch.float32),
        top_k=filled(torch.int32),
        seeds=filled(torch.int64),
    )


def copy_to(tables: Any, device: torch.device) -> Any:
    return type(tables)(
        *(getattr(tables, field.name).clone().to(device) for field in fields(tables))
    )


def assert_equal(actual: Any, expected: Any, *, except_for: tuple[str, ...] = ()) -> None:
    for field in fields(expected):
        if field.name not in except_for:
            left, right = getattr(actual, field.name).cpu(), getattr(expected, field.name)
            assert torch.equal(left, right), field.name


@pytest.mark.gpu
@given(seed=st.integers(0, 1000), num_steps=st.integers(1, 4))
def test_the_kernels_do_what_the_reference_does(
    device: torch.device, seed: int, num_steps: int
) -> None:
    from nbllm_kernels.gpu import decode_state as gpu

    expected = make_state(seed)
    state = copy_to(expected, device)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(NUM_ROWS, generator=generator)[:4], torch.tensor([NUM_ROWS])])
    for _ in range(num_steps):
        inputs, expected_inputs = make_inputs(5, device), make_inputs(5, torch.device("cpu"))
        gpu.decode_inputs(state, rows.to(device), inputs, block_size=BLOCK_SIZE)
        reference.decode_inputs(expected, rows, expected_inputs, block_size=BLOCK_SIZE)
        assert_equal(inputs, expected_inputs, except_for=("block_tables",))
        for i, seq_len in enumerate(expected_inputs.seq_lens.tolist()):
            used = -(-seq_len // BLOCK_SIZE)
            tables = inputs.block_tables[i].cpu(), expected_inputs.block_tables[i]
            assert torch.equal(tables[0][:used], tables[1][:used])
        tokens = torch.randint(-1, 9, (5,), generator=generator)
        gpu.append_tokens(state, rows.to(device), tokens.to(device))
        reference.append_tokens(expected, rows, tokens)
        assert_equal(state, expected)


@pytest.mark.gpu
def test_new_sequences_get_their_rows_and_nobody_elses_change(device: torch.device) -> None:
    from nbllm_kernels.gpu import decode_state as gpu

    before, floats = make_state(2), torch.tensor([[0.7, 0.9, 0.1], [0.0, 1.0, 0.0]])
    bits = floats.view(torch.int32)
    columns = torch.tensor(
        [
            [4, 11, 12, 13, 14, -15, *bits[0].tolist(), 5, -1, -1],
            [1, 21, 22, 23, 24, 1 << 62, *bits[1].tolist(), 6, 7, 8],
        ]
    )
    actual, expected = copy_to(before, device), copy_to(before, torch.device("cpu"))
    gpu.start_rows(actual, columns.to(device))
    reference.start_rows(expected, columns)
    assert_equal(actual, expected)
    rows = [4, 1]
    assert expected.last_token[rows].tolist() == [11, 21]
    assert expected.num_tokens[rows].tolist() == [12, 22]
    assert expected.max_tokens[rows].tolist() == [13, 23]
    assert expected.top_k[rows].tolist() == [14, 24]
    assert expected.seeds[rows].tolist() == [-15, 1 << 62]
    sampling = torch.stack([expected.temperature, expected.top_p, expected.min_p], dim=1)
    assert torch.equal(sampling[rows], floats)
    assert expected.stop_ids[rows].tolist() == [[5, -1, -1], [6, 7, 8]]
    assert expected.is_active[rows].tolist() == [1, 1]
    assert (expected.generated[rows] == -1).all()
    others = [0, 2, 3, 5, 6]
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(expected, field.name)
        assert torch.equal(old[others], new[others])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 5, 1024, 3000])
def test_rows_in_the_place_of_tokens_become_their_last_tokens(
    device: torch.device, num_tokens: int
) -> None:
    from nbllm_kernels.gpu import decode_state as gpu

    state = make_state(1)
    input_ids = torch.randint(-1 - NUM_ROWS, 9, (num_tokens,))
    expected = [x if x >= 0 else int(state.last_token[-1 - x]) for x in input_ids.tolist()]
    actual = input_ids.to(device)
    gpu.fill_last_tokens(copy_to(state, device), actual)
    reference.fill_last_tokens(state, input_ids)
    assert actual.tolist() == input_ids.tolist() == expected


def run_alone(state: DecodeState, row: int, tokens: list[int]) -> list[tuple[int, int]]:
    """(position, token) of everything that the reference says was generated."""
    for token in tokens:
        reference.append_tokens(state, torch.tensor([row]), torch.tensor([token]))
    entries = state.generated[row] - BAD_LOGITS
    pairs = zip(
        (entries >> 32).tolist(), ((entries & 0xFFFFFFFF) + BAD_LOGITS).tolist(), strict=True
    )
    return sorted(pair for pair in pairs if pair != (0, -1))


def test_a_sequence_ends_with_a_stop_token_its_length_or_bad_logits() -> None:
    state = make_state(0)
    state.num_tokens[:4] = 10
    state.max_tokens[:4] = torch.tensor([20, 13, 20, 20])
    state.stop_ids[:4] = torch.tensor([5, -1, -1])
    state.is_active[:4] = 1
    assert run_alone(state, 0, [3, 5, 7, 7]) == [(10, 3), (11, 5)]
    assert run_alone(state, 1, [1, 2, 3, 4]) == [(10, 1), (11, 2), (12, 3)]
    assert run_alone(state, 2, [1, -1, 3]) == [(10, 1), (11, BAD_LOGITS)]
    assert run_alone(state, 3, [1, 2, 3]) == [(10, 1), (11, 2), (12, 3)]
    assert state.is_active[:4].tolist() == [0, 0, 0, 1]
    assert state.num_tokens[:4].tolist() == [12, 13, 12, 13]
    assert state.last_token[3] == 3
