"""A row's tokens do not depend on what runs beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import LLM, RequestOutput, SamplingParams

NEEDLE = [11, 45, 130, 77, 301, 9, 250, 33, 84, 412, 5]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 8, "max_num_seqs": 8},  # tiny chunks
    {"enable_prefix_caching": False},
    {"num_gpu_blocks_override": 14, "max_model_len": 96},  # preemption
]


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "batch_invariant"])
def engines(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Any], device: str
) -> Iterator[tuple[bool, list[LLM]]]:
    folder, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)
    options = {"skip_tokenizer_init": True, "device": device, "dtype": "float32", "block_size": 8}
    llms = [
        LLM(folder, batch_invariant=request.param, **(options | variant)) for variant in VARIANTS
    ]
    for llm in llms:
        llm._thread._engine.check_integrity = True
    yield request.param, llms
    for llm in llms:
        llm.close()


def needle_params(seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.9,
        top_p=0.95,
        top_k=200,
        repetition_penalty=1.1,
        seed=seed,
        max_tokens=16,
        ignore_eos=True,
        logprobs=2,
    )


def batch(rng: random.Random, max_neighbours: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """The needle among random neighbours, some of which share its beginning."""
    size = rng.randrange(max_neighbours)
    prompts = [
        NEEDLE[: rng.randrange(len(NEEDLE))]
        + [rng.randrange(2, 500) for _ in range(rng.randrange(1, 30))]
        for _ in range(size)
    ]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(99),
            max_tokens=rng.randrange(1, 20),
            ignore_eos=True,
            top_p=rng.choice([1.0, 0.8]),
        )
        for _ in range(size)
    ]
    return prompts, params


def record(output: RequestOutput) -> tuple[list[int], list[dict[int, float]]]:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    entries = [{i: e.logprob for i, e in position.items()} for position in completion.logprobs]
    return completion.token_ids, entries


def check_batches(engines: tuple[bool, list[LLM]], num_batches: int, max_neighbours: int) -> None:
    bitwise, llms = engines
    rng = random.Random(3)
    alone: dict[int, tuple[list[int], list[dict[int, float]]]] = {}
    preemptions = 0
    for _ in range(num_batches):
        seed = rng.randrange(4)
        if seed not in alone:
            alone[seed] = record(llms[0].generate(NEEDLE, needle_params(seed))[0])
        llm = rng.choice(llms)
        prompts, params = batch(rng, max_neighbours)
        place = rng.randrange(len(prompts) + 1)
        prompts.insert(place, NEEDLE)
        params.insert(place, needle_params(seed))
        tokens, entries = record(llm.generate(prompts, params, use_tqdm=False)[place])
        assert tokens == alone[seed][0]
        if bitwise:
            assert entries == alone[seed][1]
    preemptions = llms[3].get_metrics()["num_preemptions"]
    assert preemptions > 0, "no batch was tight enough to preempt"


def test_a_seeded_row_has_the_same_tokens_in_any_batch(engines: tuple[bool, list[LLM]]) -> None:
    check_batches(engines, num_batches=16, max_neighbours=12)


@pytest.mark.slow
def test_a_seeded_row_has_the_same_tokens_in_two_hundred_batches(
    engines: tuple[bool, list[LLM]],
) -> None:
    check_batches(engines, num_batches=200, max_neighbours=64)
