"""/v1/completions, as OpenAI's client, vLLM's users and lm-eval call it."""

from __future__ import annotations

import gc
import http.client
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import nbllm
from nbllm import LLM, SamplingParams
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
PLAIN = "What is 17 + 25?"
STORY = "Once upon a time"


def complete(send: Send, server: Server, **body: Any) -> dict[str, Any]:
    status, _, reply = send(server, "POST", "/v1/completions", {"temperature": 0} | body)
    assert status == 200, reply
    return reply


def stream(send: Send, server: Server, **body: Any) -> list[dict[str, Any]]:
    _, headers, text = send(server, "POST", "/v1/completions", {"stream": True} | body)
    assert headers["content-type"].startswith("text/event-stream")
    events = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_token_ids_and_texts_are_the_same_prompts(
    llm: LLM, server: Server, client: openai.OpenAI
) -> None:
    prompts = [PLAIN, STORY]
    ids = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    options: Any = {"model": "nbllm-demo", "temperature": 0, "max_tokens": 8}
    texts = [c.text for c in client.completions.create(prompt=prompts, **options).choices]
    assert [c.text for c in client.completions.create(prompt=ids, **options).choices] == texts
    assert client.completions.create(prompt=ids[1], **options).choices[0].text == texts[1]
    assert client.completions.create(prompt=STORY, **options).choices[0].text == texts[1]


def test_several_prompts_are_streamed_with_the_indices_of_the_whole_reply(
    client: openai.OpenAI,
) -> None:
    options: Any = {"temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 9}
    prompts = [PLAIN, STORY, "The king"]
    whole = client.completions.create(model="nbllm-demo", prompt=prompts, **options)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts, reasons = [""] * 6, [""] * 6
    chunks = list(
        client.completions.create(
            model="nbllm-demo",
            prompt=prompts,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        reasons[chunk.choices[0].index] += chunk.choices[0].finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_one_wrong_prompt_of_a_stream_gets_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.completions.create(model="nbllm-demo", prompt=["a", "word " * 5000], stream=True)


def test_usage_may_come_with_every_chunk(send: Send, server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(
        send, server, prompt=STORY, max_tokens=4, ignore_eos=True, stream_options=options
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    only_last = stream(
        send, server, prompt=STORY, max_tokens=4, stream_options={"include_usage": True}
    )
    assert [chunk["usage"] is None for chunk in only_last[:-1]] == [True] * (len(only_last) - 1)
    assert "usage" not in stream(send, server, prompt=STORY, max_tokens=4)[-1]


def test_an_echo_begins_with_the_prompt(llm: LLM, send: Send, server: Server) -> None:
    ids = llm.get_tokenizer().encode(STORY)
    plain = complete(send, server, prompt=STORY, max_tokens=5)["choices"][0]["text"]
    for prompt in (STORY, ids):
        reply = complete(send, server, prompt=prompt, max_tokens=5, echo=True)
        assert reply["choices"][0]["text"].endswith(STORY + plain)
        assert reply["choices"][0]["logprobs"] is None
    chunks = stream(
        send, server, prompt=[STORY, PLAIN], max_tokens=5, echo=True, temperature=0, n=1
    )
    first = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == 0]
    assert "".join(choice["text"] for choice in first) == STORY + plain


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_with_logprobs_scores_the_prompt(
    llm: LLM, send: Send, server: Server, max_tokens: int
) -> None:
    # What lm-eval's local-completions sends; it reads token_logprobs and top_logprobs.
    prompts = [llm.get_tokenizer().encode(text) for text in (PLAIN, STORY)]
    reply = complete(
        send, server, prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=1, seed=1234
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for ids, choice, ours in zip(
        prompts, reply["choices"], llm.generate(prompts, params, use_tqdm=False), strict=True
    ):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + max_tokens
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        expected = ours.prompt_logprobs
        assert expected is not None
        for position, token_id in enumerate(ids[1:], start=1):
            entry = expected[position]
            assert entry is not None
            value = logprobs["token_logprobs"][position]
            assert value == pytest.approx(entry[token_id].logprob, abs=1e-4)
            best = max(logprobs["top_logprobs"][position].values())
            assert best == pytest.approx(max(e.logprob for e in entry.values()), abs=1e-4)
        offsets, text = logprobs["text_offset"], choice["text"]
        for token, offset in zip(logprobs["tokens"], offsets, strict=True):
            assert text[offset:].startswith(token)
    assert reply["usage"]["completion_tokens"] == 2 * max_tokens
    if max_tokens == 0:
        assert [choice["finish_reason"] for choice in reply["choices"]] == ["length"] * 2


def test_scored_prompts_have_the_likelihoods_of_transformers(
    llm: LLM, send: Send, server: Server
) -> None:
    from transformers import AutoModelForCausalLM

    gc.freeze()  # a million objects that the collection after every test would walk
    folder = Path(nbllm.__file__).parent / "demo"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = llm.get_tokenizer().encode("What is the capital of France? It is Paris.")
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    reply = complete(send, server, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    got = reply["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert torch.tensor(got) == pytest.approx(expected, abs=1e-4)


def test_streamed_logprobs_add_up_to_the_whole_ones(send: Send, server: Server) -> None:
    options: dict[str, Any] = {"prompt": STORY, "max_tokens": 6, "logprobs": 2, "temperature": 0}
    whole = complete(send, server, **options, echo=True)["choices"][0]["logprobs"]
    chunks = stream(send, server, **options, echo=True)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in ("tokens", "text_offset"):
        assert [item for part in parts for item in part[name]] == whole[name]
    assert sum(len(part["top_logprobs"]) for part in parts) == len(whole["tokens"])


def test_tokens_may_be_named_by_their_ids(llm: LLM, send: Send, server: Server) -> None:
    reply = complete(
        send,
        server,
        prompt=STORY,
        max_tokens=3,
        logprobs=1,
        return_tokens_as_token_ids=True,
        return_token_ids=True,
    )
    choice = reply["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert choice["prompt_token_ids"] == llm.get_tokenizer().encode(STORY)


def test_a_prompts_logprobs_come_in_vllms_form(llm: LLM, send: Send, server: Server) -> None:
    ids = llm.get_tokenizer().encode(STORY)
    entries = complete(send, server, prompt=ids, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(ids)
    assert set(entries[1][str(ids[1])]) == {"logprob", "rank", "decoded_token"}


def test_a_prompt_is_cut_from_the_left_if_asked(llm: LLM, send: Send, server: Server) -> None:
    ids = llm.get_tokenizer().encode(STORY)
    reply = complete(
        send, server, prompt=STORY, truncate_prompt_tokens=2, return_token_ids=True, max_tokens=1
    )
    assert reply["choices"][0]["prompt_token_ids"] == ids[-2:]


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"n": 129}, "n"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"x" * 3000: 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"min_tokens": 2**40}, "min_tokens"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 128}, "n"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
        ),
        ({"temperature": "1"}, "temperature"),
        ({"stop": 5}, "stop"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    send: Send, server: Server, options: dict[str, Any], parameter: str
) -> None:
    status, _, reply = send(server, "POST", "/v1/completions", {"prompt": "a"} | options)
    assert status == 400, reply
    assert reply["error"]["param"] == parameter
    assert len(reply["error"]["message"]) < 500


def test_null_is_the_same_as_left_out(send: Send, server: Server) -> None:
    nulls = dict.fromkeys(
        ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "logprobs"),
    ) | {"stream": None, "repetition_penalty": None, "user": None}
    status, _, reply = send(
        server, "POST", "/v1/completions", {"prompt": STORY, "ignore_eos": True} | nulls
    )
    assert status == 200
    assert reply["usage"]["completion_tokens"] == 16


def test_unknown_fields_are_ignored_and_a_very_low_temperature_is_taken(
    send: Send, server: Server
) -> None:
    reply = complete(send, server, prompt=STORY, temperature=0.001, frobnicate={"a": [1]})
    assert reply["choices"][0]["text"]


def test_vllms_further_parameters_reach_the_sampler(llm: LLM, send: Send, server: Server) -> None:
    allowed = llm.get_tokenizer().encode("yes", False)
    reply = complete(
        send,
        server,
        prompt=STORY,
        max_tokens=4,
        allowed_token_ids=allowed,
        return_token_ids=True,
        min_tokens=2,
        skip_special_tokens=False,
        spaces_between_special_tokens=True,
        include_stop_str_in_output=True,
        repetition_detection={"max_pattern_size": 0},
        priority=0,
        vllm_xargs={"a": 1},
    )
    assert set(reply["choices"][0]["token_ids"]) <= set(allowed)
    words = complete(send, server, prompt=STORY, max_tokens=8)["choices"][0]["text"].split()
    other = complete(send, server, prompt=STORY, max_tokens=8, bad_words=[words[0]])
    assert other["choices"][0]["text"].split()[:1] != words[:1]


def test_the_models_own_defaults_fill_what_is_left_out(
    llm: LLM, send: Send, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = SamplingParams(temperature=0.0, max_tokens=5)
    monkeypatch.setattr(llm, "get_default_sampling_params", lambda: defaults)
    body = {"prompt": STORY, "ignore_eos": True, "return_token_ids": True}
    replies = [
        send(server, "POST", "/v1/completions", body | more)[2]
        for more in ({}, {}, {"max_tokens": 3}, {"max_tokens": 100})
    ]
    ids = [reply["choices"][0]["token_ids"] for reply in replies]
    assert ids[0] == ids[1] == ids[3]  # greedy, and at most five
    assert [len(each) for each in ids] == [5, 5, 3, 5]


def test_the_clients_request_id_is_in_the_reply(send: Send, server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 1, "request_id": "mine"}
    assert send(server, "POST", "/v1/completions", body)[2]["id"] == "cmpl-mine"
    headers = {"X-Request-Id": "theirs"}
    assert send(server, "POST", "/v1/completions", body, headers)[2]["id"] == "cmpl-theirs"
    status, _, reply = send(server, "POST", "/v1/completions", body | {"request_id": "a\n"})
    assert status == 200
    assert "\n" not in reply["id"]


def test_a_client_that_leaves_before_its_answer_frees_its_request(llm: LLM, server: Server) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 900, "ignore_eos": True}
    before = llm.get_metrics()["request_success_abort"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    while llm.get_metrics()["num_requests_running"] < 2:
        pass
    connection.close()
    for _ in range(2_000):  # each round trip lets the engine run a step
        metrics = llm.get_metrics()
        if metrics["num_requests_running"] == 0:
            break
    assert metrics["request_success_abort"] == before + 2
    assert server.requests().status.iloc[-1] == 499


def test_a_grammar_is_compiled_beside_the_event_loop(
    llm: LLM, send: Send, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    prepare = llm.prepare

    def note(params: SamplingParams) -> None:
        threads.append(threading.current_thread().name)
        prepare(params)

    monkeypatch.setattr(llm, "prepare", note)
    constraint = {"choice": ["left", "right"]}
    reply = complete(send, server, prompt="a", max_tokens=9, structured_outputs=constraint)
    assert reply["choices"][0]["text"] in constraint["choice"]
    assert len(threads) == 1
    assert threads[0] != server._thread.name


def test_proxies_are_told_to_pass_a_stream_on(send: Send, server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 1, "stream": True}
    headers = send(server, "POST", "/v1/completions", body)[1]
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-cache"
