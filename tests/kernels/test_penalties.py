"""apply_penalties and count_tokens against the reference; that one against the definition."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbllm_kernels import MAX_COUNT, PROMPT_FLAG, Penalties, reference

NUM_ROWS = 5


def make_penalties(seed: int, vocab_size: int) -> Penalties:
    """Some ids in the prompt, some generated, some both; some rows without penalties."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(NUM_ROWS, generator=generator) * (high - low) + low

    shape = (NUM_ROWS, vocab_size)
    counts = torch.randint(-3, 4, shape, generator=generator).clamp(min=0)
    counts[0, 0] = MAX_COUNT
    in_prompt = torch.rand(shape, generator=generator) < 0.3
    occurrences = (counts + torch.where(in_prompt, PROMPT_FLAG, 0)).to(torch.int16)
    presence, frequency, repetition = uniform(-2, 2), uniform(-2, 2), uniform(0.5, 2)
    presence[1] = frequency[1] = 0.0
    repetition[1] = 1.0
    return Penalties(occurrences, presence, frequency, repetition)


def on(device: torch.device, penalties: Penalties) -> Penalties:
    tensors = (getattr(penalties, field.name) for field in fields(penalties))
    return Penalties(*(tensor.clone().to(device) for tensor in tensors))


@pytest.mark.gpu
@given(
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([1, 100, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_kernels_do_what_the_reference_does(
    device: torch.device, seed: int, vocab_size: int, dtype: torch.dtype
) -> None:
    from nbllm_kernels.gpu import penalties as gpu

    generator = torch.Generator().manual_seed(seed)
    penalties = make_penalties(seed, vocab_size)
    rows = torch.randperm(NUM_ROWS, generator=generator)[:3]
    logits = (torch.randn(3, vocab_size, generator=generator) * 4).to(dtype)
    logits[0, 0] = -torch.inf
    on_device = on(device, penalties)
    actual = gpu.apply_penalties(logits.to(device), rows.to(device), on_device)
    expected = reference.apply_penalties(logits, rows, penalties)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-5)
    token_ids = torch.randint(-1, vocab_size, (3,), generator=generator)
    gpu.count_tokens(on_device, rows.to(device), token_ids.to(device))
    reference.count_tokens(penalties, rows, token_ids)
    assert torch.equal(on_device.occurrences.cpu(), penalties.occurrences)


@pytest.mark.gpu
def test_a_wrong_shape_is_refused(device: torch.device) -> None:
    from nbllm_kernels.gpu import penalties as gpu

    penalties = on(device, make_penalties(0, 100))
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="occurrences"):
        gpu.apply_penalties(torch.zeros(2, 99, device=device), rows, penalties)
    with pytest.raises(ValueError, match="rows"):
        gpu.apply_penalties(torch.zeros(3, 100, device=device), rows, penalties)


def test_penalties_follow_their_definition_and_counts_stop_at_their_limit() -> None:
    penalties = make_penalties(3, 50)
    logits = torch.randn(NUM_ROWS, 50, generator=torch.Generator().manual_seed(4))
    before = logits.clone()
    rows = torch.arange(NUM_ROWS)
    actual = reference.apply_penalties(logits, rows, penalties)
    assert torch.equal(logits, before)
    for row in range(NUM_ROWS):
        for token in range(50):
            occurred = int(penalties.occurrences[row, token])
            count, x = occurred & MAX_COUNT, float(before[row, token])
            if occurred:
                factor = float(penalties.repetition[row])
                x = x / factor if x > 0 else x * factor
            x -= float(penalties.frequency[row]) * count + float(penalties.presence[row]) * (
                count > 0
            )
            assert float(actual[row, token]) == pytest.approx(x, rel=1e-5, abs=1e-5)
    reference.count_tokens(penalties, torch.tensor([0, 1]), torch.tensor([0, -1]))
    assert int(penalties.occurrences[0, 0]) & MAX_COUNT == MAX_COUNT
