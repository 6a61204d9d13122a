"""What a server tells of itself, and the tokens of a text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbllm import LLM, InvalidRequestError, __version__
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
CHAT = [{"role": "user", "content": "Hello!"}]


def samples(send: Send, server: Server) -> dict[str, float]:
    """Name and reason or bound -> value."""
    status, headers, text = send(server, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("http_"):  # they have no prefix, and labels of their own
            continue
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "nbllm-demo"
            assert labels.pop("engine") == "0"
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_metrics_are_those_of_the_engine_and_of_the_requests(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        before = samples(send, server)
        body = {"prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": True}
        usage = send(server, "POST", "/v1/completions", body)[2]["usage"]
        chunked = send(server, "POST", "/v1/completions", body | {"stream": True})[0]
        assert chunked == 200
        after = samples(send, server)
        engine = llm.get_metrics()
    assert after["nbllm:generation_tokens_total"] - before["nbllm:generation_tokens_total"] == 10
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"nbllm:{name}"] == engine[name]
    for name in ("prompt_tokens", "prefix_cache_hits", "prefix_cache_queries", "num_preemptions"):
        assert after[f"nbllm:{name}_total"] == engine[name]
    ended = "nbllm:request_success_total length"
    assert after[ended] - before[ended] == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert before[f"nbllm:{name}_count"] == 0
        assert after[f"nbllm:{name}_count"] == 2
        assert after[f"nbllm:{name}_sum"] > 0
    assert after["nbllm:request_generation_tokens_sum"] == 10
    assert after["nbllm:request_prompt_tokens_sum"] == 2 * usage["prompt_tokens"]


def test_metrics_may_have_vllms_names(llm: LLM, send: Send) -> None:
    with llm.serve(metrics_prefix="vllm") as server:
        found = samples(send, server)
    assert "vllm:num_requests_running" in found
    assert all(name.startswith("vllm:") for name in found)
    with pytest.raises(InvalidRequestError) as caught:
        llm.serve(metrics_prefix="x y")
    assert caught.value.parameter == "metrics_prefix"


def test_version_load_models_and_openapi(llm: LLM, send: Send, server: Server) -> None:
    assert send(server, "GET", "/version")[2] == {"version": __version__}
    assert send(server, "GET", "/load")[2] == {"server_load": 0}
    card = send(server, "GET", "/v1/models/nbllm-demo")[2]
    assert card["max_model_len"] == llm.config.max_model_len
    assert 0 <= time.time() - card["created"] < 86_400
    assert send(server, "GET", "/v1/models")[2]["data"] == [card]
    assert send(server, "GET", "/v1/models/other")[0] == 404
    document = send(server, "GET", "/openapi.json")[2]
    schemas = document["components"]["schemas"]
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert schemas[name]["properties"]
    assert "temperature" in schemas["ChatCompletionRequest"]["properties"]


@pytest.mark.parametrize(("method", "body"), [("GET", None), ("POST", {})])
def test_ping_is_health_behind_the_key(
    llm: LLM, send: Send, monkeypatch: pytest.MonkeyPatch, method: str, body: Any
) -> None:
    with llm.serve() as server:
        assert send(server, method, "/ping", body)[0] == 200
        assert send(server, method, "/ping", body, {"Authorization": None})[0] == 401
        monkeypatch.setattr(llm, "is_healthy", lambda: False)
        assert send(server, method, "/ping", body)[0] == 503
        assert send(server, "GET", "/health", headers={"Authorization": None})[0] == 503


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/completions"), ("POST", "/health")])
def test_another_method_is_an_error_of_the_same_form(
    send: Send, server: Server, method: str, path: str
) -> None:
    status, _, reply = send(server, method, path, {} if method == "POST" else None)
    assert status == 405
    assert reply["error"]["code"] == 405


def test_a_text_is_tokenized_and_comes_back(llm: LLM, send: Send, server: Server) -> None:
    text = "Grüße, 東京!"
    reply = send(server, "POST", "/tokenize", {"prompt": text, "return_token_strs": True})[2]
    ids = llm.get_tokenizer().encode(text)
    assert reply["tokens"] == ids
    assert reply["count"] == len(reply["token_strs"]) == len(ids)
    assert reply["max_model_len"] == llm.config.max_model_len
    assert send(server, "POST", "/detokenize", {"tokens": ids})[2] == {"prompt": text}


def test_a_conversation_is_tokenized_as_a_chat_is(llm: LLM, send: Send, server: Server) -> None:
    reply = send(server, "POST", "/tokenize", {"messages": CHAT})[2]
    assert reply["tokens"] == llm.encode_chat(CHAT)["prompt_token_ids"]
    assert reply["token_strs"] is None
    bare = send(server, "POST", "/tokenize", {"messages": CHAT, "add_generation_prompt": False})[2]
    assert bare["count"] < reply["count"]


@pytest.mark.parametrize(
    ("path", "body", "parameter"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_has_no_tokens_is_refused(
    send: Send, server: Server, path: str, body: dict[str, Any], parameter: str
) -> None:
    status, _, reply = send(server, "POST", path, body)
    assert status == 400
    assert reply["error"]["param"] == parameter


def test_cached_tokens_are_told_if_asked(llm: LLM, send: Send) -> None:
    body = {"prompt": "word " * 100, "max_tokens": 1}
    with llm.serve(enable_prompt_tokens_details=True) as server:
        send(server, "POST", "/v1/completions", body)
        usage = send(server, "POST", "/v1/completions", body)[2]["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
