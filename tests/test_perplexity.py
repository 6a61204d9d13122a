"""How likely the bundled model finds a text does not depend on the way that the text took."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest
import torch

from nbllm import LLM, SamplingParams, TokensPrompt
from nbllm.hub import resolve_model

NUM_TEXTS, NUM_TOKENS = 8, 150
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def sample_texts(**options: Any) -> tuple[list[list[int]], int, float]:
    """Texts of the model's own; where they begin behind the prompt; and their mean log-probability
    as it was reported while they were sampled, all at once."""
    params = [
        SamplingParams(seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
        for seed in range(NUM_TEXTS)
    ]
    with LLM(**options) as llm:
        outputs = llm.generate(["Once upon a time"] * NUM_TEXTS, params, use_tqdm=False)
    texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
    completions = [output.outputs[0] for output in outputs]
    total = sum(completion.cumulative_logprob or 0.0 for completion in completions)
    return texts, len(outputs[0].prompt_token_ids), total / (NUM_TEXTS * NUM_TOKENS)


def score_texts(texts: list[list[int]], start: int, **options: Any) -> float:
    """Mean log-probability of the tokens from `start` on, read as prompts."""
    prompts = [TokensPrompt(prompt_token_ids=text) for text in texts]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with LLM(**options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    scores: list[float] = []
    for text, output in zip(texts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for token, entry in list(zip(text, output.prompt_logprobs, strict=True))[start:]:
            assert entry is not None
            scores.append(entry[token].logprob)
    return fmean(scores)


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_scoring_chunks_and_transformers_agree_in_float32(device: str) -> None:
    from transformers import AutoModelForCausalLM

    options = {"device": device, "dtype": "float32"}
    texts, start, sampled = sample_texts(**options)
    scored = score_texts(texts, start, **options)
    assert scored == pytest.approx(sampled, abs=1e-5)
    chunked = score_texts(texts, start, **options, max_num_seqs=4, max_num_batched_tokens=48)
    assert chunked == pytest.approx(scored, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(None), dtype=torch.float32)
    ids = torch.tensor(texts)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(ids).logits, dim=-1)
    reference = logprobs[:, start - 1 : -1].gather(-1, ids[:, start:, None]).mean()
    assert scored == pytest.approx(float(reference), abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_fewer_bits_change_the_perplexity_by_less_than_half_a_percent(device: str) -> None:
    options = {"device": device, "dtype": "float32"}
    texts, start, exact = sample_texts(**options)
    for changes in (
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    ):
        ratio = math.exp(exact - score_texts(texts, start, **(options | changes)))
        assert ratio == pytest.approx(1.0, abs=0.005), changes
