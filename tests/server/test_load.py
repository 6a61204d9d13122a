"""Many clients at a time over real sockets: nobody gets another's text, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nbllm import LLM, SamplingParams
from nbllm.server.serve import Server

BODY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "stream": True}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with llm.serve() as server:
        yield server


def make_client(server: Server, num_connections: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.url,
        headers={"Authorization": f"Bearer {server.api_key}"},
        limits=httpx.Limits(max_connections=num_connections),
        timeout=300,
    )


async def read_stream(client: httpx.AsyncClient, prompt: str, **options: Any) -> str:
    text, is_done = "", False
    async with client.stream(
        "POST", "/v1/completions", json=BODY | {"prompt": prompt} | options
    ) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
    assert is_done
    return text


def check_streams(llm: LLM, server: Server, num_streams: int, num_requests: int) -> None:
    prompts = [f"What is {i % 60} + {i // 60 % 60}?" for i in range(num_requests)]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    distinct = sorted(set(prompts))
    outputs = llm.generate(distinct, params, use_tqdm=False)
    expected = {p: o.outputs[0].text for p, o in zip(distinct, outputs, strict=True)}
    assert len(set(expected.values())) > 20

    async def run() -> None:
        queue = iter(prompts)

        async def worker() -> None:
            for prompt in queue:
                assert await read_stream(client, prompt) == expected[prompt]

        async with make_client(server, num_streams) as client:
            await asyncio.gather(*(worker() for _ in range(num_streams)))

    asyncio.run(run())
    assert llm.get_metrics()["num_requests_running"] == 0
    assert llm.get_metrics()["kv_cache_usage_perc"] == 0.0


def test_many_streams_at_a_time_are_not_mixed_up(llm: LLM, server: Server) -> None:
    check_streams(llm, server, num_streams=60, num_requests=120)


@pytest.mark.slow
def test_five_hundred_streams_at_a_time_are_not_mixed_up(llm: LLM, server: Server) -> None:
    check_streams(llm, server, num_streams=500, num_requests=2_000)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_is_flat_over_twenty_thousand_requests(llm: LLM, server: Server) -> None:
    def resident_bytes() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    check_streams(llm, server, num_streams=100, num_requests=4_000)
    before = resident_bytes()
    check_streams(llm, server, num_streams=100, num_requests=20_000)
    assert resident_bytes() - before < 50e6


# -- clients that leave ---------------------------------------------------------------------------


def check_free(llm: LLM) -> None:
    metrics = llm.get_metrics()  # between two steps, after whatever was sent to the engine before
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_cache_usage_perc"] == 0.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def abandon(server: Server, num_streams: int, num_tokens: int) -> None:
    """Begin streams, read the first event of each, and leave them all."""

    async def begin(client: httpx.AsyncClient, number: int) -> None:
        body = BODY | {"prompt": [number + 5], "max_tokens": num_tokens, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            async for _ in reply.aiter_lines():
                return

    async def run() -> None:
        async with make_client(server, num_streams) as client:
            await asyncio.gather(*(begin(client, i) for i in range(num_streams)))

    asyncio.run(run())


def test_streams_that_are_abandoned_free_their_pages(llm: LLM, server: Server) -> None:
    abandon(server, num_streams=30, num_tokens=400)
    wait_until(lambda: server.stats.num_running == 0)
    check_free(llm)  # no step later than the server knows


@pytest.mark.slow
def test_two_hundred_streams_of_ten_thousand_tokens_are_ended_within_a_second(
    make_checkpoint: Any, make_tokenizer: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder, _ = make_checkpoint("Qwen3", head_dim=16, max_position_embeddings=16_384)
    tokenizer = make_tokenizer("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    options: dict[str, Any] = {"max_model_len": 12_000, "max_num_seqs": 256}
    with LLM(str(folder), device="cpu", dtype="float32", **options) as llm, llm.serve() as server:
        abandon(server, num_streams=200, num_tokens=10_000)
        start = time.monotonic()
        wait_until(lambda: llm.get_metrics()["num_requests_running"] == 0)
        ended_s = time.monotonic() - start
        body = BODY | {"prompt": [5, 6], "stream": False}
        headers = {"X-API-Key": server.api_key or ""}
        reply = httpx.post(server.base_url + "/completions", json=body, headers=headers, timeout=30)
        answered_s = time.monotonic() - start - ended_s
        print(f"ended after {ended_s:.2f} s, the next answer after {answered_s:.2f} s")
        assert reply.status_code == 200
        assert ended_s < 1.0
        assert answered_s < 5.0
        check_free(llm)


class Gate:
    """Holds the engine before its forward pass number `stop_at`, counted from 1."""

    def __init__(self, stop_at: int) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._stop_at = stop_at
        self._count = 0

    def __call__(self, *_: Any) -> None:
        self._count += 1
        if self._count == self._stop_at:
            self.reached.set()
            self.open.wait(60)


@pytest.fixture(scope="module")
def narrow_llm() -> Iterator[LLM]:
    """One row at a time, and prompts in pieces of 64 tokens."""
    options: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 64}
    with LLM(device="cpu", dtype="float32", max_model_len=512, **options) as llm:
        yield llm


def send_request(server: Server, body: dict[str, Any]) -> socket.socket:
    """A client that has sent its request and has not read anything."""
    sent = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.api_key}\r\nContent-Length: {len(sent)}\r\n\r\n"
    )
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    raw.sendall(head.encode() + sent)
    return raw


ASK: dict[str, Any] = {"prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
# Before which forward pass the client leaves, and its request: a prompt of 200 tokens has four.
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "prefill": (2, ASK | {"prompt": [5] * 200}),
    "first token": (1, ASK),
    "decode": (2, ASK),
    "last token": (3, ASK),
    "one of several prompts": (2, ASK | {"prompt": ["a", "b", "c"]}),
    "one of several choices": (2, ASK | {"n": 3, "temperature": 1}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_may_leave_at_any_stage(narrow_llm: LLM, stage: str, stream: bool) -> None:
    stop_at, body = STAGES[stage]
    gate = Gate(stop_at)
    with narrow_llm.serve() as server:
        hook = narrow_llm._thread.call(lambda e: e.runner.model.register_forward_pre_hook(gate))
        try:
            with send_request(server, body | {"stream": stream}):
                assert gate.reached.wait(30)
            # It is noticed, and all is said and done, while the engine is in the middle of a step.
            wait_until(lambda: server.stats.num_requests == 1)
        finally:
            gate.open.set()
            narrow_llm._thread.call(lambda _: hook.remove())
        check_free(narrow_llm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_leave_the_queue(narrow_llm: LLM, stream: bool) -> None:
    gate = Gate(2)
    with narrow_llm.serve() as server:
        hook = narrow_llm._thread.call(lambda e: e.runner.model.register_forward_pre_hook(gate))
        try:
            with send_request(server, ASK) as first:
                assert gate.reached.wait(30)
                with send_request(server, ASK | {"stream": stream}):
                    wait_until(lambda: server.stats.num_running == 2)
                wait_until(lambda: server.stats.num_running == 1)
                gate.open.set()
                assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
        finally:
            gate.open.set()
            narrow_llm._thread.call(lambda _: hook.remove())
        check_free(narrow_llm)


def test_a_client_may_leave_while_its_grammar_is_compiled(
    narrow_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(1)
    prepare = narrow_llm.prepare

    def wait_then_prepare(params: SamplingParams) -> None:
        gate()
        prepare(params)

    monkeypatch.setattr(narrow_llm, "prepare", wait_then_prepare)
    before = narrow_llm.get_metrics()["num_steps"]
    with narrow_llm.serve() as server:
        with send_request(server, ASK | {"structured_outputs": {"regex": "[ab]{9}"}}):
            assert gate.reached.wait(30)
        gate.open.set()
        wait_until(lambda: server.stats.num_requests == 1)
        check_free(narrow_llm)
    assert narrow_llm.get_metrics()["num_steps"] - before <= 1  # hardly begun
