"""What users receive, and how it is put together while the engine goes on."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from nbllm import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams
from nbllm.engine.request import FinishReason, Request
from nbllm.inputs import EncodedPrompt
from nbllm.output_processor import OutputProcessor
from nbllm.outputs import RequestMetrics
from nbllm.tokenizer import Tokenizer

VLLM_FIELDS = {
    RequestOutput: (
        "request_id prompt prompt_token_ids prompt_logprobs outputs finished metrics lora_request "
        "encoder_prompt encoder_prompt_token_ids num_cached_tokens kv_transfer_params"
    ),
    CompletionOutput: (
        "index text token_ids cumulative_logprob logprobs finish_reason stop_reason "
        "routed_experts lora_request"
    ),
    Logprob: "logprob rank decoded_token",
}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[str], Any]) -> Tokenizer:
    return Tokenizer(make_tokenizer("byte_level"), special_tokens={"eos_token": "</s>"})


def start(tokenizer: Tokenizer, kind: RequestOutputKind, **options: Any) -> Any:
    """(request that continues "The quick", its processor)."""
    params = SamplingParams(max_tokens=50, **options)
    prompt = EncodedPrompt("The quick", tokenizer.encode("The quick"))
    request = Request(
        request_id="7",
        token_ids=array("I", prompt.token_ids),
        num_prompt_tokens=len(prompt.token_ids),
        sampling_params=params,
        max_tokens=50,
        seed=0,
        eos_token_ids=frozenset([2]),
    )
    return request, OutputProcessor(prompt, [request], params, tokenizer, kind)


@pytest.mark.parametrize("cls", VLLM_FIELDS)
def test_the_fields_are_those_of_vllm(cls: Any) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    assert set(VLLM_FIELDS[cls].split()) <= names


def test_metrics_have_vllms_names_too() -> None:
    metrics = RequestMetrics(
        arrival_time=1.0, scheduled_time=2.0, first_token_time=3.5, finished_time=5.0
    )
    assert (metrics.queued_ts, metrics.scheduled_ts, metrics.first_token_ts) == (1.0, 2.0, 3.5)
    assert (metrics.last_token_ts, metrics.first_token_latency) == (5.0, 2.5)
    assert RequestMetrics(arrival_time=1.0).first_token_latency == 0.0


def test_an_old_mark_of_a_request_that_has_ended_since_is_not_its_end(
    tokenizer: Tokenizer,
) -> None:
    request, processor = start(tokenizer, RequestOutputKind.DELTA)
    ids = tokenizer.encode(" brown fox")
    for token_id in [*ids, 2]:  # the engine is through before the reader looks
        request.extend([token_id])
    assert request.is_finished
    assert processor.update(request, len(ids)) is False
    first = processor.report()
    assert first.outputs[0].text == " brown fox"
    assert (first.finished, first.outputs[0].finish_reason) == (False, None)
    assert processor.update(request, len(ids) + 1) is True
    last = processor.report()
    assert (last.outputs[0].text, last.outputs[0].token_ids) == ("", [2])
    assert (last.finished, last.outputs[0].finish_reason) == (True, "stop")


def test_a_request_that_is_aborted_ends_at_its_last_mark(tokenizer: Tokenizer) -> None:
    request, processor = start(tokenizer, RequestOutputKind.CUMULATIVE)
    request.extend([tokenizer.encode("a")[0]])
    request.finish(FinishReason.ABORT)
    assert processor.update(request, 1) is True
    output = processor.report()
    assert output.outputs[0].finish_reason == "abort" and output.outputs[0].text == "a"
    assert output.outputs[0].finished()


def test_deltas_have_their_own_logprobs_and_the_sum_so_far(tokenizer: Tokenizer) -> None:
    request, processor = start(tokenizer, RequestOutputKind.DELTA, logprobs=0)
    sums = []
    for number, token_id in enumerate(tokenizer.encode(" brown")):
        request.logprobs.append({token_id: Logprob(-0.5, 1)})
        request.extend([token_id])
        request.logprobs.append({9: Logprob(-9.0)})  # of a token that the reader can't see yet
        processor.update(request, number + 1)
        request.logprobs.pop()
        completion = processor.report().outputs[0]
        assert completion.logprobs is not None and len(completion.logprobs) == 1
        assert completion.logprobs[0][token_id].decoded_token == tokenizer.token_text(token_id)
        sums.append(completion.cumulative_logprob)
    assert sums == [-0.5 * (i + 1) for i in range(len(sums))]
