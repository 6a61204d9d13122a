"""Reported log-probabilities against torch's log_softmax."""

from __future__ import annotations

import pytest
import torch

from nbllm.engine.logprobs import report_logprobs


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3


def test_the_chosen_token_comes_first_then_the_most_likely(logits: torch.Tensor) -> None:
    chosen = torch.tensor([3, 0, 39, 7, 7])
    counts = [0, 1, 5, -1, 100]
    wanted = [(count, None) for count in counts]
    exact = torch.log_softmax(logits.double(), dim=-1)
    for row, entry in enumerate(report_logprobs(logits, chosen, wanted).entries()):
        order = exact[row].argsort(descending=True).tolist()
        count = 40 if counts[row] in (-1, 100) else counts[row]
        token = int(chosen[row])
        assert next(iter(entry)) == token
        assert set(entry) == {token, *order[:count]}
        rest = [t for t in entry if t != token]
        assert rest == [t for t in order[:count] if t != token]
        for token_id, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(exact[row, token_id]), abs=1e-5)
            assert logprob.rank == order.index(token_id) + 1


def test_named_tokens_replace_the_most_likely_ones(logits: torch.Tensor) -> None:
    chosen = torch.tensor([1, 2, 3, 4, 5])
    wanted = [(2, None), (3, []), (1, [9]), (2, [4, 0]), (3, [39, 38, 37])]
    entries = report_logprobs(logits, chosen, wanted).entries()
    assert len(entries[0]) in (2, 3)
    assert [set(entry) for entry in entries[1:]] == [{2}, {3, 9}, {4, 0}, {5, 39, 38, 37}]
    exact = torch.log_softmax(logits.double(), dim=-1)
    for row, entry in enumerate(entries):
        for token_id, logprob in entry.items():
            rank = int((exact[row] > exact[row, token_id]).sum()) + 1
            assert (logprob.rank, logprob.logprob) == (
                rank,
                pytest.approx(float(exact[row, token_id]), abs=1e-5),
            )


def test_equal_logits_share_the_best_rank() -> None:
    (entry,) = report_logprobs(torch.zeros(1, 6), torch.tensor([4]), [(0, None)]).entries()
    assert entry[4].rank == 1
