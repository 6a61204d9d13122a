"""Beam search against transformers' own and against brute force, on a tiny model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nbllm import LLM, BeamSearchParams, InvalidRequestError

VOCAB_SIZE = 8
EOS = 1
PROMPTS = [[3, 5, 3], [7, 2], [4, 4, 4, 6, 2]]


@pytest.fixture(scope="module")
def small(make_checkpoint: Callable[..., Any]) -> Iterator[tuple[LLM, Any]]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    folder, model = make_checkpoint("Qwen3", vocab_size=VOCAB_SIZE, initializer_range=0.5, **sizes)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 16}
    with LLM(folder, skip_tokenizer_init=True, **options) as llm:
        yield llm, model


def logprob_of(model: Any, prompt: list[int], text: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[0].double()
    steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return float(sum(step[token] for step, token in zip(steps, text, strict=True)))


@pytest.mark.parametrize("beam_width", [1, 2, 4])
def test_beams_are_those_of_transformers(small: tuple[LLM, Any], beam_width: int) -> None:
    llm, model = small
    params = BeamSearchParams(beam_width=beam_width, max_tokens=6, ignore_eos=True)
    outputs = llm.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=beam_width,
                num_return_sequences=beam_width,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert [beam.tokens for beam in output.sequences] == expected.tolist()


def test_a_beam_wide_enough_finds_the_best_of_all_texts(small: tuple[LLM, Any]) -> None:
    llm, model = small
    for length_penalty in (0.0, 1.0, 3.0):
        params = BeamSearchParams(10, 3, length_penalty=length_penalty)
        (output,) = llm.beam_search(PROMPTS[0], params)
        # Ten beams of eight tokens: nothing is lost at the first step, so with two steps the
        # search is complete; three make it a real one, checked against the same rules.
        beams: list[tuple[list[int], float]] = [([], 0.0)]
        finished: list[tuple[list[int], float]] = []
        for _ in range(3):
            extended = [
                ([*text, token], logprob_of(model, PROMPTS[0], [*text, token]))
                for (text, _), token in itertools.product(beams, range(VOCAB_SIZE))
            ]
            finished += [beam for beam in extended if beam[0][-1] == EOS]
            beams = sorted((b for b in extended if b[0][-1] != EOS), key=lambda b: -b[1])[:10]
        ranked = sorted(
            finished + beams,
            key=lambda b: -b[1] / (3 + len(b[0]) - (b[0][-1] == EOS)) ** length_penalty,
        )[:10]
        assert [beam.tokens[3:] for beam in output.sequences] == [text for text, _ in ranked]
        for beam, (_, logprob) in zip(output.sequences, ranked, strict=True):
            assert beam.cum_logprob == pytest.approx(logprob, abs=1e-4)
            assert len(beam.logprobs) == len(beam.tokens) - 3
            ended = beam.tokens[-1] == EOS
            assert (beam.finish_reason, beam.stop_reason) == (
                ("stop", EOS) if ended else ("length", None)
            )


def test_beams_end_where_the_context_does(small: tuple[LLM, Any]) -> None:
    llm, _ = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (output,) = llm.beam_search([2] * 12, BeamSearchParams(2, 100, ignore_eos=True))
    assert [len(beam.tokens) for beam in output.sequences] == [16, 16]


def test_more_beams_than_logprobs_are_refused(small: tuple[LLM, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="max_logprobs"):
        small[0].beam_search(PROMPTS[0], BeamSearchParams(11, 2))


def test_a_wrong_prompt_is_refused(small: tuple[LLM, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        small[0].beam_search([VOCAB_SIZE], BeamSearchParams(2, 2))
