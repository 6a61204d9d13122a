"""The sampler against exact probabilities on a small vocabulary (chi-square, fixed seeds)."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from nbllm import RequestFailedError, SamplingParams
from nbllm.engine.batch import Batch, StepInput
from nbllm.engine.request import Request
from nbllm.engine.sampler import SamplingKind, draw, forbidden_ids, restrict
from nbllm.engine.scheduler_output import ScheduledRequest
from nbllm.engine.step_buffers import StepBuffers, StepSize
from nbllm_kernels import SamplingTensors, sample

VOCAB_SIZE = 12
NUM_ROWS = 3000
PROMPT = [0, 1, 1, 2]
OUTPUT = [3, 3, 4, 5]
EOS = 11
BAD_WORDS = [[7], [4, 5, 8], [4, 9], [10, 5, 0, 6]]

# Sorted by hand so that no filter's border falls on a tie.
LOGITS = [2.0, 1.2, -0.4, 1.7, 0.3, 0.9, -1.0, 2.3, 0.1, -2.0, 0.6, 1.5]


def make_batch(rows: list[tuple[SamplingParams, int]], **fields: Any) -> tuple[Batch, StepInput]:
    """One request per (params, seed), all with the same prompt and output."""
    requests = [
        Request(
            request_id=str(number),
            token_ids=array("I", PROMPT + OUTPUT),
            num_prompt_tokens=len(PROMPT),
            sampling_params=params,
            max_tokens=100,
            seed=seed,
            eos_token_ids=frozenset([EOS]),
            **fields,
        )
        for number, (params, seed) in enumerate(rows)
    ]
    batch = Batch(
        max_num_seqs=len(rows),
        max_model_len=64,
        block_size=8,
        vocab_size=VOCAB_SIZE,
        device=torch.device("cpu"),
    )
    batch.update(requests)
    nothing: Any = None
    buffers = StepBuffers(StepSize(0, 0, len(rows), 0), batch.device)
    buffers["sampled_rows"].copy_(torch.tensor([batch.rows[request] for request in requests]))
    sampled = [ScheduledRequest(r, r.num_tokens - 1, 1, 1, r.shapes_logits) for r in requests]
    step = StepInput(buffers, nothing, sampled)
    return batch, step


def sample_tokens(logits: torch.Tensor, step: StepInput, batch: Batch) -> torch.Tensor:
    """All that happens to logits, in the order of a step."""
    restrict(logits, step.sampled)
    kind, rows = SamplingKind.of(step.sampled), step.sampled_rows
    params = kind.tensors(batch.state, batch.state.num_tokens[rows].to(torch.int64), rows)
    return draw(logits, rows, params, kind, batch)


def sample_counts(params: SamplingParams, **fields: Any) -> np.ndarray:
    batch, step = make_batch([(params, seed) for seed in range(NUM_ROWS)], **fields)
    tokens = sample_tokens(torch.tensor([LOGITS] * NUM_ROWS), step, batch)
    return np.bincount(tokens.numpy(), minlength=VOCAB_SIZE)


def exact_probabilities(params: SamplingParams, bad_words: list[list[int]]) -> np.ndarray:
    """The definition, step by step, in float64 and without a vectorized shortcut."""
    logits = {token: float(x) for token, x in enumerate(LOGITS)}
    history = Counter(OUTPUT)
    if params.allowed_token_ids is not None:
        logits = {t: x for t, x in logits.items() if t in params.allowed_token_ids}
    for word in bad_words:
        if OUTPUT[len(OUTPUT) - len(word) + 1 :] == word[:-1]:
            logits.pop(word[-1], None)
    if len(OUTPUT) < params.min_tokens:
        for token in [EOS, *(params.stop_token_ids or ())]:
            logits.pop(token, None)
    for token in logits:
        logits[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in PROMPT or token in history:
            penalty = params.repetition_penalty
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        logits[token] -= params.frequency_penalty * history[token]
        logits[token] -= params.presence_penalty * (history[token] > 0)
        logits[token] /= params.temperature
    weight = {t: np.exp(x) for t, x in logits.items()}
    highest = max(weight.values())
    weight = {t: w for t, w in weight.items() if w >= params.min_p * highest}
    order = sorted(weight, key=lambda t: -weight[t])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weight[t] for t in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += weight[token] / total
    result = np.zeros(VOCAB_SIZE)
    for token in kept:
        result[token] = weight[token]
    return result / result.sum()


def assert_distributed(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """No impossible token, and the others as often as they should be (p-value above 0.001)."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    if possible.sum() > 1:
        expected = probabilities[possible] * counts.sum()
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.9},
    "negative frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.8},
    "inverse repetition": {"repetition_penalty": 0.6},
    "logit_bias": {"logit_bias": {9: 4.0, 7: -100.0, 0: 1.0}},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": [0, 3]},
    "min_tokens reached": {"min_tokens": 4, "stop_token_ids": [0, 3]},
    "allowed_token_ids": {"allowed_token_ids": [2, 5, 7]},
    "one allowed": {"allowed_token_ids": [6]},
    "all filters": {"temperature": 1.5, "top_k": 8, "top_p": 0.85, "min_p": 0.05},
    "all penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.3,
    },
    "everything": {
        "temperature": 0.8,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {4: 1.0, 2: 3.0},
        "min_tokens": 9,
        "stop_token_ids": [7],
        "allowed_token_ids": [0, 2, 3, 4, 5, 7, 8, 10, 11],
    },
}


@pytest.mark.parametrize("name", [*OPTIONS, "bad_words", "everything and bad_words"])
def test_samples_have_the_exact_distribution(name: str) -> None:
    bad_words = BAD_WORDS if "bad_words" in name else []
    params = SamplingParams(**OPTIONS.get(name.removesuffix(" and bad_words"), {}))
    counts = sample_counts(params, bad_words_token_ids=bad_words)
    assert_distributed(counts, exact_probabilities(params, bad_words))


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.6},
        {"top_p": 0.97},
        {"top_k": 40, "temperature": 2.0},
        {"top_k": 500, "top_p": 0.8},
        {"min_p": 0.001},
        {"min_p": 0.05, "top_p": 0.9, "top_k": 300},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.5, 3.0], ids=["flat", "steep"])
def test_a_large_vocabulary_is_filtered_exactly(options: dict[str, Any], spread: float) -> None:
    # The fast path looks at the 256 most likely ids; these filters keep fewer and more than that.
    vocab_size, num_rows = 700, 3000
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0)) * spread
    params = SamplingParams(**options)
    column = torch.ones(num_rows)
    tensors = SamplingTensors(
        temperature=column * params.temperature,
        top_k=(column * params.top_k).int(),
        top_p=column * params.top_p,
        min_p=column * params.min_p,
        seeds=torch.arange(num_rows),
        positions=torch.arange(num_rows) * 0 + 3,
        all_greedy=False,
        any_filter=True,
    )
    tokens = sample(logits.repeat(num_rows, 1), tensors).numpy()

    x = logits.double().numpy() / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p] = 0
    order = np.argsort(-p, kind="stable")
    p[order[params.top_k or vocab_size :]] = 0
    before = np.concatenate([[0], np.cumsum(p[order] / p.sum())[:-1]])
    p[order[before >= params.top_p]] = 0
    p /= p.sum()
    counts = np.bincount(tokens, minlength=vocab_size)
    assert not counts[p == 0].any()
    # Ids in order of probability, in groups that are expected about thirty times.
    groups = np.minimum(np.cumsum(p[order]), 1 - 1e-9) * (num_rows // 30)
    observed = np.bincount(groups.astype(int), counts[order])
    expected = np.bincount(groups.astype(int), p[order] * num_rows)
    kept = expected > 5
    assert (
        stats.chisquare(
            observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()
        ).pvalue
        > 1e-3
    )


def test_positions_are_as_independent_as_seeds() -> None:
    params = SamplingParams(temperature=1.3)
    batch, step = make_batch([(params, 5)] * NUM_ROWS)
    batch.state.num_tokens[step.sampled_rows] = torch.arange(NUM_ROWS, dtype=torch.int32)
    tokens = sample_tokens(torch.tensor([LOGITS] * NUM_ROWS), step, batch)
    counts = np.bincount(tokens.numpy(), minlength=VOCAB_SIZE)
    assert_distributed(counts, exact_probabilities(params, []))
    # Neighbouring positions know nothing of each other.
    pairs = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(pairs, (tokens[:-1].numpy(), tokens[1:].numpy()), 1)
    frequent = counts > NUM_ROWS * 0.05
    assert stats.chi2_contingency(pairs[frequent][:, frequent]).pvalue > 1e-3


def test_a_row_is_sampled_the_same_whoever_its_neighbours_are() -> None:
    rows = [(SamplingParams(**options), seed) for seed, options in enumerate(OPTIONS.values())]
    batch, step = make_batch(rows, bad_words_token_ids=BAD_WORDS)
    together = sample_tokens(torch.tensor([LOGITS] * len(rows)), step, batch).tolist()
    for row, token in zip(rows, together, strict=True):
        batch, step = make_batch([row], bad_words_token_ids=BAD_WORDS)
        assert sample_tokens(torch.tensor([LOGITS]), step, batch).tolist() == [token]


def test_greedy_rows_take_the_best_token_after_restrictions_and_penalties() -> None:
    for options, best in (
        ({}, 7),
        ({"logit_bias": {7: -1.0}}, 0),
        ({"allowed_token_ids": [2, 9]}, 2),
        ({"repetition_penalty": 2.0, "logit_bias": {7: -100}}, EOS),
        ({"presence_penalty": 2.0, "logit_bias": {7: -3.0, 3: 1.0}}, 0),
    ):
        batch, step = make_batch([(SamplingParams(temperature=0, **options), 0)])
        assert sample_tokens(torch.tensor([LOGITS]), step, batch).tolist() == [best], options


def test_equal_logits_are_drawn_equally_often() -> None:
    params = SamplingParams(top_p=0.999)
    batch, step = make_batch([(params, seed) for seed in range(NUM_ROWS)])
    tokens = sample_tokens(torch.zeros(NUM_ROWS, VOCAB_SIZE), step, batch)
    counts = np.bincount(tokens.numpy(), minlength=VOCAB_SIZE)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_bad_words_forbid_only_what_completes_them() -> None:
    _, step = make_batch([(SamplingParams(), 0)], bad_words_token_ids=BAD_WORDS)
    assert forbidden_ids(step.sampled[0]) == [7, 8]
    step.sampled[0].request.token_ids.append(4)
    assert forbidden_ids(step.sampled[0]) == [7, 9]


def test_a_bad_word_does_not_begin_in_the_prompt() -> None:
    _, step = make_batch([(SamplingParams(), 0)], bad_words_token_ids=[[2, 3, 3, 4, 5, 6]])
    assert forbidden_ids(step.sampled[0]) == []


def test_a_request_that_allows_no_token_is_found() -> None:
    dead = SamplingParams(allowed_token_ids=[7, EOS], min_tokens=9)
    alive = SamplingParams(allowed_token_ids=[7, EOS, 8], min_tokens=9)
    _, step = make_batch([(dead, 0), (alive, 0)], bad_words_token_ids=[[7]])
    errors = restrict(torch.zeros(2, VOCAB_SIZE), step.sampled)
    assert list(errors) == [step.sampled[0].request]
    assert isinstance(errors[step.sampled[0].request], RequestFailedError)
