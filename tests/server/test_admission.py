"""Who comes when too many are inside, who waits how long, and what is said of a stuck engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import LLM
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 3, "ignore_eos": True}
MAX_NUM_SEQS = 8
MAX_INSIDE = 64


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": MAX_NUM_SEQS}
    with LLM(device="cpu", dtype="float32", **options) as llm:
        yield llm


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    with llm.serve(max_concurrent_requests=MAX_INSIDE) as server:
        yield server


async def post(server: Server) -> tuple[int, str]:
    """Status and head of the reply. HTTP clients take longer for a thousand than the server."""
    body = json.dumps(BODY)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Authorization: Bearer {server.api_key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write((head + body).encode())
    reply_head, _, reply = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    assert json.loads(reply).keys() & {"choices", "error"}
    return int(reply_head.split()[1]), reply_head.lower()


def ask_at_once(
    server: Server, num_requests: int, *, num_at_once: int, comes_again: bool
) -> tuple[Counter[int], float]:
    """Statuses of all replies; how long it took until the last client had its own, in seconds."""
    counts: Counter[int] = Counter()

    async def ask(places: asyncio.Semaphore) -> None:
        async with places:
            while True:
                status, head = await post(server)
                counts[status] += 1
                if status != 429:
                    return
                retry_after_s = int(head.partition("retry-after: ")[2].split()[0])
                if not comes_again:
                    return
                await asyncio.sleep(retry_after_s)

    async def run() -> None:
        places = asyncio.Semaphore(num_at_once)
        await asyncio.gather(*(ask(places) for _ in range(num_requests)))

    start = time.monotonic()
    asyncio.run(run())
    return counts, time.monotonic() - start


def check_order(server: Server) -> None:
    """Nobody is overtaken by more than twice as many as came before, and those beside them."""
    frame = server.requests()
    served = frame[(frame["status"] == 200) & (frame["route"] == "/v1/completions")]
    ended = (served["started"].astype("int64") / 1e9 + served["seconds"]).rank()
    came = served["started"].rank(method="first")
    assert (ended <= 3 * (came + MAX_NUM_SEQS)).all()


def check_empty(llm: LLM, server: Server) -> None:
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_cache_usage_perc"] == 0.0
    assert server.stats.num_running == 0


def test_who_is_one_too_many_is_told_to_come_again(llm: LLM, server: Server) -> None:
    num_clients = 2 * MAX_INSIDE
    counts, _ = ask_at_once(server, num_clients, num_at_once=num_clients, comes_again=False)
    assert set(counts) == {200, 429}
    assert counts[200] >= MAX_INSIDE
    check_order(server)
    check_empty(llm, server)


@pytest.mark.slow
def test_a_thousand_at_once_are_all_served_and_nobody_starves(llm: LLM, server: Server) -> None:
    counts, in_line_s = ask_at_once(server, 1000, num_at_once=MAX_INSIDE, comes_again=False)
    assert counts == {200: 1000}
    counts, longest_s = ask_at_once(server, 1000, num_at_once=1000, comes_again=True)
    print(f"{counts}; the longest wait: {longest_s:.1f} s; one behind the other: {in_line_s:.1f} s")
    assert set(counts) == {200, 429}
    assert counts[200] == 1000
    assert longest_s < 3 * in_line_s
    check_empty(llm, server)


class Wedge:
    """Holds the model in its forward pass, as a kernel does that never returns."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def __call__(self, module: Any, inputs: Any) -> None:
        self.entered.set()
        self.release.wait(60)


@pytest.mark.parametrize("waits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_engine_that_is_stuck_is_not_healthy(
    llm: LLM, server: Server, send: Send, waits: bool
) -> None:
    """It is asked for its health while a step does not end; `waits` lets the five seconds pass."""
    wedge = Wedge()
    hook = llm._thread.call(lambda engine: engine.runner.model.register_forward_pre_hook(wedge))
    replies: list[int] = []
    thread = threading.Thread(
        target=lambda: replies.append(send(server, "POST", "/v1/completions", BODY)[0])
    )
    thread.start()
    try:
        assert wedge.entered.wait(30)
        assert send(server, "GET", "/health")[0] == 200  # a step may take a while
        if not waits:
            llm._thread.last_progress -= 5.0
        start = time.monotonic()
        while send(server, "GET", "/health")[0] == 200:
            assert time.monotonic() - start < 6.0
            time.sleep(0.1 if waits else 0)
        assert send(server, "GET", "/health")[0] == 503
        status, headers, _ = send(server, "GET", "/metrics")  # which would have to ask the engine
        assert (status, "retry-after" in headers) == (503, True)
        assert send(server, "GET", "/v1/models")[0] == 200
    finally:
        wedge.release.set()
        thread.join()
        hook.remove()
    assert replies == [200]  # it was only late
    assert send(server, "GET", "/health")[0] == 200
    assert send(server, "POST", "/v1/completions", BODY)[0] == 200
