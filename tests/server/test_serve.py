"""llm.serve(): the real OpenAI client over a real socket, beside a cell that generates."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nbllm import LLM, InvalidRequestError, SamplingParams
from nbllm.server.serve import Server

CHAT: Any = [{"role": "user", "content": "What is the capital of France?"}]
PLAIN = "What is 17 + 25?"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0) as client:
        yield client


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """A raw request, for what no client would send."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    named = {
        "Authorization": f"Bearer {server.api_key}",
        "Content-Type": "application/json",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("POST", path, body, named)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nbllm-demo"]


def test_a_chat_is_answered_as_in_the_cell(llm: LLM, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="nbllm-demo", messages=CHAT, temperature=0, max_completion_tokens=24
    )
    ours = llm.chat(CHAT, SamplingParams(temperature=0.0, max_tokens=24))[0]
    assert reply.choices[0].message.content == ours.outputs[0].text
    assert "Paris" in ours.outputs[0].text
    assert reply.choices[0].finish_reason == ours.outputs[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ours.prompt_token_ids)
    assert reply.usage.completion_tokens == len(ours.outputs[0].token_ids)


def test_a_streamed_chat_adds_up_to_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="nbllm-demo", messages=CHAT, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="nbllm-demo",
            messages=CHAT,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas].count("assistant") == 1
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert chunks[-1].usage == whole.usage


def test_completions_take_several_prompts_and_give_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="nbllm-demo", prompt=[PLAIN, "What is 3 + 4?"], temperature=0, logprobs=2
    )
    assert [choice.text.strip() for choice in reply.choices] == ["42", "7"]
    assert [choice.index for choice in reply.choices] == [0, 1]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs and logprobs.tokens
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)
    assert len(logprobs.tokens) == len(logprobs.token_logprobs)


def test_several_streamed_choices_keep_apart(client: openai.OpenAI) -> None:
    options: Any = {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 12}
    whole = client.completions.create(model="nbllm-demo", prompt="Once upon", **options)
    texts = ["", "", ""]
    stream = client.completions.create(
        model="nbllm-demo", prompt="Once upon", stream=True, **options
    )
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) > 1


def test_the_async_client_works_while_a_cell_generates(llm: LLM, server: Server) -> None:
    prompts = [f"What is {i} + {i}?" for i in range(24)]
    cell: list[str] = []
    params = SamplingParams(temperature=0.0, max_tokens=8)
    expected = [o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)]

    def generate() -> None:
        cell.extend(o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False))

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.api_key) as client:
            replies = await asyncio.gather(
                *(
                    client.completions.create(
                        model="nbllm-demo", prompt=prompt, temperature=0, max_tokens=8
                    )
                    for prompt in prompts
                )
            )
        return [reply.choices[0].text for reply in replies]

    thread = threading.Thread(target=generate)
    thread.start()
    over_http = asyncio.run(ask())
    thread.join(60)
    assert over_http == cell == expected


def test_a_client_that_goes_away_frees_its_request(llm: LLM, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="nbllm-demo", prompt="a", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    aborted = llm.get_metrics()["request_success_abort"]
    for _ in range(2_000):  # each round trip lets the engine run a step
        metrics = llm.get_metrics()
        if metrics["num_requests_running"] == 0:
            break
    assert metrics["num_requests_running"] == 0
    assert metrics["generation_tokens"] > 0
    assert metrics["request_success_abort"] >= aborted


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_parameter_is_named(
    client: openai.OpenAI, options: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**({"model": "nbllm-demo", "prompt": "a"} | options))
    assert caught.value.param == parameter


def test_another_models_name_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")


def test_a_prompt_that_is_too_long_gets_a_status_even_when_streamed(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.completions.create(model="nbllm-demo", prompt="word " * 5000, stream=True)


def test_without_the_key_every_route_but_health_is_shut(server: Server) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="nbllm-demo", prompt="a")
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"prompt": "a"}', {"Host": "evil.example"}, 403),
        (b'{"prompt": "a"}', {"Content_Type": "text/plain"}, 415),
        (b'{"prompt": "a", "temperature": NaN}', {}, 400),
        (b'{"prompt": "a", "temperature": Infinity}', {}, 400),
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": {"a": 1}}', {}, 400),
        (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', {}, 413),
    ],
)
def test_a_body_that_makes_no_sense_is_refused(
    server: Server, body: bytes, headers: dict[str, str], status: int
) -> None:
    got, reply = post(server, "/v1/completions", body, **headers)
    assert got == status
    assert reply["error"]["message"]
    assert len(json.dumps(reply)) < 600  # the body is not repeated


def test_an_unknown_route_is_an_error_of_the_same_form(server: Server) -> None:
    status, reply = post(server, "/v1/nothing", b"{}")
    assert status == 404
    assert reply["error"]["type"] == "invalid_request_error"


def test_a_port_that_is_taken_is_an_error_that_says_so(llm: LLM, server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(InvalidRequestError, match="can't be bound") as caught:
        llm.serve(port=port)
    assert caught.value.parameter == "port"


def test_an_open_address_needs_a_key(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="api_key"):
        llm.serve(host="0.0.0.0", api_key=None)


def test_what_a_cell_shows_has_no_key_in_it(server: Server) -> None:
    assert server.api_key is not None
    assert server.api_key not in repr(server)
    assert server.base_url in repr(server)


def test_closing_the_llm_stops_its_servers() -> None:
    before = threading.active_count()
    llm = LLM(device="cpu")
    server = llm.serve()
    llm.close()
    assert not server.is_running
    assert "stopped" in repr(server)
    assert threading.active_count() == before
