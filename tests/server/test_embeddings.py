"""/v1/embeddings, as OpenAI's client and vLLM's users call it."""

from __future__ import annotations

import base64
import http.client
import json
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbllm import LLM, PoolingParams, RequestFailedError
from nbllm.server.embeddings import MAX_INPUTS
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
TEXTS = ["What is 17 + 25?", "Once upon a time", "The soup was cold."]


def vectors(llm: LLM, prompts: Any, **params: Any) -> list[list[float]]:
    outputs = llm.embed(prompts, pooling_params=PoolingParams(**params), use_tqdm=False)
    return [output.outputs.embedding for output in outputs]


def close(left: Any, right: Any) -> bool:
    """The same, but for the order of sums in another batch."""
    return np.shape(left) == np.shape(right) and np.allclose(left, right, atol=1e-5)


def test_openais_client_gets_the_vectors_of_the_engine(llm: LLM, client: openai.OpenAI) -> None:
    expected = vectors(llm, TEXTS)
    ids = [llm.get_tokenizer().encode(text) for text in TEXTS]
    for given in (TEXTS, ids):
        reply = client.embeddings.create(model="nbllm-demo", input=given)  # asks for base64
        assert [item.index for item in reply.data] == [0, 1, 2]
        assert all(item.object == "embedding" for item in reply.data)
        assert close([item.embedding for item in reply.data], expected)
        assert (reply.object, reply.model) == ("list", "nbllm-demo")
        num_tokens = sum(map(len, ids))
        assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (num_tokens, num_tokens)
    for one in (TEXTS[1], ids[1]):
        (item,) = client.embeddings.create(model="nbllm-demo", input=one).data
        assert close(item.embedding, expected[1])


def test_base64_holds_the_same_numbers_as_the_list(send: Send, server: Server) -> None:
    body = {"input": TEXTS[0]}
    for plain in (body, body | {"encoding_format": "float", "user": "somebody", "other": 1}):
        status, _, reply = send(server, "POST", "/v1/embeddings", plain)
        assert status == 200 and reply["id"].startswith("embd-")
        numbers = reply["data"][0]["embedding"]
    packed = send(server, "POST", "/v1/embeddings", body | {"encoding_format": "base64"})[2]
    raw = base64.b64decode(packed["data"][0]["embedding"], validate=True)
    assert close(struct.unpack(f"<{len(numbers)}f", raw), numbers)


def test_the_vector_may_be_of_another_kind(llm: LLM, client: openai.OpenAI) -> None:
    for extra in (
        {"pooling": "mean"},
        {"normalize": False},
        {"use_activation": False},
        {"dimensions": 32},
        {"pooling": "mean", "normalize": False, "dimensions": 5},
    ):
        reply = client.embeddings.create(model="nbllm-demo", input=TEXTS, extra_body=extra)
        assert close([item.embedding for item in reply.data], vectors(llm, TEXTS, **extra))


def test_a_long_input_is_cut_if_that_is_asked_for(llm: LLM, send: Send, server: Server) -> None:
    size = llm.config.max_model_len
    assert size is not None
    ids = [5 + number % 300 for number in range(size + 9)]
    for keep, kept in ((-1, ids[9:]), (7, ids[-7:])):
        body = {"input": ids, "truncate_prompt_tokens": keep}
        reply = send(server, "POST", "/v1/embeddings", body)[2]
        assert reply["usage"]["prompt_tokens"] == len(kept)
        assert close(reply["data"][0]["embedding"], vectors(llm, kept)[0])
    text = "word " * 100_000  # more than is tokenized to be refused
    reply = send(server, "POST", "/v1/embeddings", {"input": text, "truncate_prompt_tokens": -1})[2]
    assert reply["usage"]["prompt_tokens"] == size
    status, _, reply = send(server, "POST", "/v1/embeddings", {"input": ids})
    assert status == 400 and "max_model_len" in reply["error"]["message"]


def wait_for_metrics(llm: LLM, has_come: Callable[[Any], bool]) -> dict[str, Any]:
    end = time.monotonic() + 60
    while not has_come(metrics := llm.get_metrics()):
        assert time.monotonic() < end, metrics
    return metrics


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": "word " * 1100}, "input"),
        ({"input": "word " * 100_000}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 4096}, "dimensions"),
        ({"input": "a", "dimensions": "all"}, "dimensions"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "normalize": "yes"}, "normalize"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"input": "a", "user": 5}, "user"),
    ],
)
def test_a_wrong_field_is_named(
    send: Send, server: Server, body: dict[str, Any], parameter: str
) -> None:
    status, _, reply = send(server, "POST", "/v1/embeddings", body)
    assert status == 400, reply
    assert reply["error"]["param"] == parameter
    assert reply["error"]["type"] == "invalid_request_error"


def test_model_key_and_method_are_checked_as_everywhere(send: Send, server: Server) -> None:
    body = {"input": "a"}
    assert send(server, "POST", "/v1/embeddings", body | {"model": "other"})[0] == 404
    assert send(server, "POST", "/v1/embeddings", body, {"Authorization": None})[0] == 401
    assert send(server, "GET", "/v1/embeddings")[0] == 405
    document = send(server, "GET", "/openapi.json")[2]
    assert "dimensions" in document["components"]["schemas"]["EmbeddingRequest"]["properties"]


def test_many_inputs_come_back_in_order(llm: LLM, client: openai.OpenAI) -> None:
    inputs = [[2 + number % 200, 3 + number // 200] for number in range(700)]
    reply = client.embeddings.create(model="nbllm-demo", input=inputs, dimensions=8)
    found = np.array([item.embedding for item in reply.data])
    assert [item.index for item in reply.data] == list(range(700))
    for number in (0, 1, 399, 699):
        assert close(found[number], vectors(llm, inputs[number], dimensions=8)[0])


def test_texts_and_vectors_are_answered_at_the_same_time(llm: LLM, client: openai.OpenAI) -> None:
    expected = vectors(llm, TEXTS, pooling="mean")
    options: Any = {"model": "nbllm-demo", "temperature": 0, "max_tokens": 30}
    text = client.completions.create(prompt=TEXTS[1], **options).choices[0].text

    def ask(number: int) -> bool:
        if number % 2:
            return client.completions.create(prompt=TEXTS[1], **options).choices[0].text == text
        reply = client.embeddings.create(
            model="nbllm-demo", input=TEXTS, extra_body={"pooling": "mean"}
        )
        return close([item.embedding for item in reply.data], expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_requests_are_logged_and_measured(llm: LLM, send: Send) -> None:
    def samples(server: Server) -> dict[str, float]:
        families = text_string_to_metric_families(send(server, "GET", "/metrics")[2])
        return {s.name: s.value for family in families for s in family.samples}

    with llm.serve() as server:
        before = samples(server)
        headers = {"X-Request-Id": "mine"}
        usage = send(server, "POST", "/v1/embeddings", {"input": TEXTS}, headers)[2]["usage"]
        after = samples(server)
        record = server.requests().iloc[-2]  # the last one asked for the metrics
    assert (record["id"], record["route"], record["status"]) == (
        "embd-mine",
        "/v1/embeddings",
        200,
    )
    assert (record["prompt_tokens"], record["completion_tokens"]) == (usage["prompt_tokens"], 0)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["nbllm:request_prompt_tokens_count"] == len(TEXTS)
    assert grown["nbllm:request_prompt_tokens_sum"] == usage["prompt_tokens"]
    assert grown["nbllm:e2e_request_latency_seconds_count"] == len(TEXTS)
    assert grown["nbllm:time_to_first_token_seconds_count"] == 0
    assert grown["nbllm:generation_tokens_total"] == 0


def test_a_request_that_fails_in_the_engine_is_an_error_of_the_server(
    llm: LLM, send: Send, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a path of mine")

    with monkeypatch.context() as patch:
        patch.setattr(llm._thread._engine.runner.pooler, "pool", broken)
        status, _, reply = send(server, "POST", "/v1/embeddings", {"input": TEXTS})
        with pytest.raises(RequestFailedError):
            llm.embed(TEXTS[0])
    assert status == 500
    assert "mine" not in reply["error"]["message"]
    assert send(server, "POST", "/v1/embeddings", {"input": TEXTS})[0] == 200


def test_a_client_that_leaves_ends_its_work(llm: LLM, server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = {"input": [[2 + n % 300 for n in range(1000)]] * 500, "pooling": "mean"}
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/embeddings", json.dumps(body), headers)
    before = wait_for_metrics(llm, lambda metrics: metrics["num_requests_running"] > 0)
    connection.close()
    metrics = wait_for_metrics(
        llm, lambda m: m["num_requests_running"] == m["num_requests_waiting"] == 0
    )
    assert metrics["kv_cache_usage_perc"] == 0
    assert metrics["request_success_stop"] - before["request_success_stop"] < 500
