"""Many prompts, token for token and log-probability for log-probability as transformers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbllm import LLM, SamplingParams

MakeCheckpoint = Callable[..., tuple[Path, Any]]
NUM_NEW = 32
CONFIG = {"head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 1024}


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 512) for _ in range(rng.randint(1, 600))] for _ in range(count)]


def reference(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens and the float32 log-probabilities [NUM_NEW, vocab_size]."""
    model.generation_config.eos_token_id = None  # all texts have their full length
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(generated.logits).float().cpu()
    return generated.sequences[0, len(prompt) :].tolist(), torch.log_softmax(logits, dim=-1)


def check_float32(make_checkpoint: MakeCheckpoint, device: str, count: int) -> None:
    folder, model = make_checkpoint("Qwen3", **CONFIG)
    prompts = random_prompts(count)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, logprobs=1)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "device": device, "dtype": "float32"}
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        tokens, logprobs = reference(model, prompt)
        assert completion.token_ids == tokens
        assert completion.logprobs is not None
        for step, entry in enumerate(completion.logprobs):
            for token, logprob in entry.items():
                worst = max(worst, abs(logprob.logprob - float(logprobs[step, token])))
    assert worst <= 1e-4


def first_gap(tokens: list[int], ours: list[int], logprobs: torch.Tensor) -> float:
    """How much less likely our token is where the texts part; what follows has another context."""
    for step, (token, other) in enumerate(zip(tokens, ours, strict=True)):
        if token != other:
            return float(logprobs[step, token] - logprobs[step, other])
    return 0.0


def check_bfloat16(make_checkpoint: MakeCheckpoint, device: str, count: int) -> None:
    """Against the rounded weights computed exactly we err no more than transformers' bfloat16."""
    folder, model = make_checkpoint("Qwen3", **CONFIG)
    exact = copy.deepcopy(model).to(device)  # on a GPU in float32 too: torch does not use TF32
    for parameter in exact.parameters():  # not the buffers: the rotary frequencies stay float32
        parameter.data = parameter.data.bfloat16().float()
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    prompts = random_prompts(count)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "device": device, "dtype": "bfloat16"}
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    our_gaps, their_gaps = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs = reference(exact, prompt)
        our_gaps.append(first_gap(tokens, output.outputs[0].token_ids, logprobs))
        their_gaps.append(first_gap(tokens, reference(half, prompt)[0], logprobs))
    # By chance a few prompts have no near tie on their side; of 300 their widest gap is 0.077.
    assert max(our_gaps) <= max(0.1, 1.25 * max(their_gaps))
    wide, their_wide = (sum(gap > 0.05 for gap in gaps) for gaps in (our_gaps, their_gaps))
    assert wide <= 1.25 * their_wide + 1


def test_greedy_tokens_and_logprobs_equal_those_of_transformers(
    make_checkpoint: MakeCheckpoint, device: str
) -> None:
    check_float32(make_checkpoint, device, count=25)


def test_bfloat16_differs_only_where_two_tokens_are_nearly_tied(
    make_checkpoint: MakeCheckpoint, device: str
) -> None:
    # A dozen prompts have a near tie or none by chance; a GPU has time for more of them.
    check_bfloat16(make_checkpoint, device, count=12 if device == "cpu" else 100)


@pytest.mark.slow
def test_a_thousand_prompts_equal_those_of_transformers(
    make_checkpoint: MakeCheckpoint, device: str
) -> None:
    check_float32(make_checkpoint, device, count=1_000)


@pytest.mark.slow
def test_a_thousand_bfloat16_prompts_differ_only_at_near_ties(
    make_checkpoint: MakeCheckpoint, device: str
) -> None:
    check_bfloat16(make_checkpoint, device, count=1_000)
