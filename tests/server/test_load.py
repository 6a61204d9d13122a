"""Many clients at a time over real sockets: nobody gets another's text, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Iterator
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
    check_streams(llm, server, num_streams=60, num_requests=180)


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


def check_abandoned(llm: LLM, server: Server, num_streams: int) -> None:
    """Streams whose clients leave are gone within a second, and a new one is served."""

    async def abandon(client: httpx.AsyncClient, number: int) -> None:
        body = BODY | {"prompt": f"{number}", "max_tokens": 400, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                return

    async def run() -> None:
        async with make_client(server, num_streams) as client:
            await asyncio.gather(*(abandon(client, i) for i in range(num_streams)))
        deadline = asyncio.get_running_loop().time() + 1.0
        while llm.get_metrics()["num_requests_running"]:
            assert asyncio.get_running_loop().time() < deadline, "streams go on without a reader"
            await asyncio.sleep(0.01)
        async with make_client(server, 1) as client:
            assert (await read_stream(client, "What is 17 + 25?")).strip() == "42"

    asyncio.run(run())
    assert llm.get_metrics()["kv_cache_usage_perc"] == 0.0


def test_streams_that_are_abandoned_free_their_pages(llm: LLM, server: Server) -> None:
    check_abandoned(llm, server, num_streams=30)


@pytest.mark.slow
def test_two_hundred_streams_that_are_abandoned_free_their_pages(llm: LLM, server: Server) -> None:
    check_abandoned(llm, server, num_streams=200)
