"""A row that goes on after tokens of an earlier call ends as that call would have ended it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from nbllm import LLM, RequestOutput, SamplingParams
from nbllm.inputs import EncodedPrompt
from nbllm.sampling_params import StructuredOutputsParams

PROMPT = "Once upon a time"
FORMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    "several": {"temperature": 1.0, "seed": 5, "n": 3},
    "penalized": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "stopped": {"temperature": 1.0, "seed": 1, "stop": [".", "the"], "min_tokens": 12},
    "constrained": {
        "temperature": 1.0,
        "seed": 2,
        "structured_outputs": StructuredOutputsParams(regex="[a-z ]{10,60}!"),
    },
    "no bad words": {"temperature": 0.0, "bad_words": ["the", "a"]},
    "repeated": {"temperature": 0.0, "logit_bias": {5: 100.0}},
}


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    with LLM(device=device, dtype="float32") as llm:
        llm._thread._engine.check_integrity = True
        yield llm


def run(
    llm: LLM, params: SamplingParams, begun: Sequence[Sequence[Sequence[int]]] = ((),)
) -> list[RequestOutput]:
    """The same row, after other tokens each time."""
    token_ids = llm.get_tokenizer().encode(PROMPT)
    rows = [(EncodedPrompt(PROMPT, token_ids, begun=texts), params, 0) for texts in begun]
    with llm._call(rows) as call:
        outputs = dict(call.results())
    return [outputs[number] for number in range(len(rows))]


@pytest.mark.parametrize("name", FORMS)
def test_a_row_goes_on_from_anywhere(llm: LLM, name: str) -> None:
    params = SamplingParams(max_tokens=40, **FORMS[name])
    (whole,) = run(llm, params)
    cuts = [[o.token_ids[:-1][:length] for o in whole.outputs] for length in range(40)]
    for again in run(llm, params, cuts):
        for before, after in zip(whole.outputs, again.outputs, strict=True):
            assert after.token_ids == before.token_ids
            assert after.text == before.text
            ends = [(o.finish_reason, o.stop_reason) for o in (before, after)]
            assert ends[0] == ends[1]


def test_what_is_there_is_not_computed_again(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (whole,) = run(llm, params)
    before = llm.get_metrics()["generation_tokens"]
    (again,) = run(llm, params, [[whole.outputs[0].token_ids[:30]]])
    assert llm.get_metrics()["generation_tokens"] - before == 10
    assert again.num_cached_tokens <= len(again.prompt_token_ids)


def test_more_than_may_be_generated_is_cut(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    longer = run(llm, params)[0].outputs[0].token_ids
    cut = run(llm, params.clone(max_tokens=10), [[longer]])[0].outputs[0]
    assert cut.token_ids == longer[:10] and cut.finish_reason == "length"


def test_a_token_that_is_none_is_an_error_of_its_row(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    (output,) = run(llm, params, [[[10**6]]])
    assert output.error is not None and "vocabulary" in str(output.error)
