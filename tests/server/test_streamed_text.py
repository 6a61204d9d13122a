"""A streamed text is the whole one: in any language, cut anywhere, with stops across tokens."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nbllm import LLM
from nbllm.server.serve import Server

REPLACEMENT = "\ufffd"
NUM_AT_ONCE = 32
# Graphemes of several code points and of up to four bytes each, whose bytes are tokens.
TEXTS = [
    "Grüße",
    "日本語の文",
    "👩‍👩‍👧‍👦 family",
    "🏳️‍🌈🇩🇪",
    "हिन्दी में",
    "עברית",
    "العَرَبِيَّة",
    "e\u0301\u0323x",
    "a\u200db",
]


@pytest.fixture(scope="module")
def llm(make_checkpoint: Any, make_tokenizer: Any) -> Iterator[LLM]:
    """Random weights over a byte-level vocabulary: most of what it writes is no UTF-8."""
    from transformers import PreTrainedTokenizerFast

    folder, _ = make_checkpoint("Qwen3", head_dim=16, vocab_size=400)
    special = {"eos_token": "</s>", "bos_token": "<s>"}
    tokenizer = make_tokenizer("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    with LLM(str(folder), device="cpu", dtype="float32", max_num_seqs=NUM_AT_ONCE) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with llm.serve() as server:
        yield server


def bodies(llm: LLM, num_runs: int) -> list[dict[str, Any]]:
    """Requests that steer the model into texts of many bytes, some of them broken, with stops."""
    rng = random.Random(0)
    tokenizer = llm.get_tokenizer()
    made: list[dict[str, Any]] = []
    for number in range(num_runs):
        ids = tokenizer.encode(rng.choice(TEXTS), False)
        wanted = [i for text in rng.sample(TEXTS, 3) for i in tokenizer.encode(text, False)]
        body: dict[str, Any] = {
            "prompt": ids[: rng.randint(1, len(ids))],  # it may end within a character
            "seed": number,
            "temperature": rng.choice([0.5, 1.0, 2.0]),
            "max_tokens": rng.randint(1, 40),
            "ignore_eos": True,
            "skip_special_tokens": rng.random() < 0.8,
        }
        if number % 2:  # right texts; else what comes, which is hardly ever UTF-8
            text = rng.choice(TEXTS)  # all begin with it, so that a stop in it is met
            body["structured_outputs"] = {
                "choice": [text + "".join(rng.choices(TEXTS, k=3)) for _ in range(3)]
            }
        else:
            body["logit_bias"] = {str(i): 20 + 5 * rng.random() for i in wanted}
            text = rng.choice(TEXTS)
        if rng.random() < 0.6:
            start = rng.randrange(len(text))
            stops = [text[start : start + rng.randint(1, 3)], "no such text"]
            body |= {"stop": stops, "include_stop_str_in_output": rng.random() < 0.5}
        made.append(body)
    return made


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, Any, Any]:
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["text"], choice["finish_reason"], choice["stop_reason"]


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[str], Any, Any]:
    deltas: list[str] = []
    last: dict[str, Any] = {}
    request = client.stream("POST", "/v1/completions", json=body | {"stream": True})
    async with request as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                (last,) = json.loads(line.removeprefix("data: "))["choices"]
                deltas.append(last["text"])
    return deltas, last["finish_reason"], last["stop_reason"]


def check(llm: LLM, server: Server, num_runs: int) -> dict[str, int]:
    """Compare every request's deltas with its whole text; returns what kinds there were."""
    kinds = dict.fromkeys(("several bytes", "broken", "stopped", "in parts"), 0)

    async def compare(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        text, *reasons = await whole(client, body)
        deltas, *streamed_reasons = await streamed(client, body)
        assert "".join(deltas) == text, body
        assert streamed_reasons == reasons, body
        assert all(deltas[:-1]), body  # only the last may have no text
        if "structured_outputs" in body:  # no half of a character, unless it is cut off there
            assert REPLACEMENT not in "".join(deltas[:-1]), body
        stop = reasons[1]
        if isinstance(stop, str):
            assert stop not in text.removesuffix(stop), body
            assert text.endswith(stop) == body["include_stop_str_in_output"], body
        kinds["several bytes"] += any(ord(char) > 127 for char in text if char != REPLACEMENT)
        kinds["broken"] += REPLACEMENT in text
        kinds["stopped"] += isinstance(stop, str)
        kinds["in parts"] += len(deltas) > 2

    async def run() -> None:
        queue = iter(bodies(llm, num_runs))

        async def work() -> None:
            for body in queue:
                await compare(client, body)

        headers = {"Authorization": f"Bearer {server.api_key}"}
        limits = httpx.Limits(max_connections=NUM_AT_ONCE)
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, limits=limits, timeout=60
        ) as client:
            await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))

    asyncio.run(run())
    return kinds


@pytest.mark.parametrize("num_runs", [40, pytest.param(2_000, marks=pytest.mark.slow)])
def test_deltas_add_up_to_the_whole_text(llm: LLM, server: Server, num_runs: int) -> None:
    kinds = check(llm, server, num_runs)
    assert min(kinds.values()) > num_runs // 20, kinds
