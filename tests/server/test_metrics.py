"""/metrics tells the truth: its names are vLLM's, its numbers are what clients got."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbllm import LLM, CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from nbllm.outputs import RequestMetrics
from nbllm.server import metrics as metrics_module
from nbllm.server.metrics import ServerMetrics
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
STORY = "Once upon a time"
# vLLM's metrics for which there is a fact here.
VLLM_NAMES = {
    "gauge": (
        "num_requests_running num_requests_waiting num_requests_waiting_by_reason "
        "kv_cache_usage_perc cache_config_info"
    ),
    "counter": (
        "prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens "
        "prompt_tokens_by_source prompt_tokens_cached generation_tokens request_success"
    ),
    "histogram": (
        "iteration_tokens_total time_to_first_token_seconds inter_token_latency_seconds "
        "request_time_per_output_token_seconds e2e_request_latency_seconds "
        "request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
        "request_inference_time_seconds request_prompt_tokens request_generation_tokens "
        "request_max_num_generation_tokens request_prefill_kv_computed_tokens "
        "request_params_n request_params_max_tokens"
    ),
}


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def scrape(send: Send, server: Server) -> dict[str, float]:
    """Name of a sample, without the prefix, and its own labels -> value."""
    status, _, text = send(server, "GET", "/metrics")
    assert status == 200
    found: dict[str, float] = {}
    for family in families(text).values():
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            name = sample.name.split(":")[-1]
            found[" ".join([name, *own.values()])] = sample.value
    return found


def difference(after: Mapping[str, float], before: Mapping[str, float], name: str) -> float:
    return after[name] - before[name]


@pytest.mark.parametrize("prefix", ["nbllm", "vllm"])
def test_all_of_vllms_names_are_there_with_their_types(llm: LLM, send: Send, prefix: str) -> None:
    with llm.serve(metrics_prefix=prefix) as server:
        found = families(send(server, "GET", "/metrics")[2])
    expected = {
        f"{prefix}:{name}": kind for kind, names in VLLM_NAMES.items() for name in names.split()
    }
    expected |= {"http_requests": "counter", "http_request_duration_seconds": "histogram"}
    assert {name: family.type for name, family in found.items()} == expected
    assert all(family.documentation for family in found.values())
    for name, label, values in (
        ("request_success", "finished_reason", {"stop", "length", "abort", "error", "repetition"}),
        ("prompt_tokens_by_source", "source", {"local_compute", "local_cache_hit"}),
        ("num_requests_waiting_by_reason", "reason", {"capacity"}),
    ):
        samples = found[f"{prefix}:{name}"].samples
        assert {sample.labels[label] for sample in samples} == values
    (config,) = found[f"{prefix}:cache_config_info"].samples
    assert config.value == 1
    assert config.labels["block_size"] == str(llm.config.block_size)
    assert int(config.labels["num_gpu_blocks"]) > 1
    assert config.labels["enable_prefix_caching"] == "True"


def test_histograms_are_what_prometheus_expects(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        for n in (1, 2):
            send(server, "POST", "/v1/completions", {"prompt": STORY, "n": n, "max_tokens": 3})
        found = families(send(server, "GET", "/metrics")[2])
    for family in found.values():
        if family.type != "histogram" or family.name.startswith("http_"):
            continue
        values = {s.name.removeprefix(family.name): s.value for s in family.samples}
        buckets = [s for s in family.samples if s.name.endswith("_bucket")]
        bounds = [float(bucket.labels["le"]) for bucket in buckets]
        assert bounds == sorted(set(bounds))
        assert buckets[-1].labels["le"] == "+Inf"
        counts = [bucket.value for bucket in buckets]
        assert counts == sorted(counts)
        assert counts[-1] == values["_count"] > 0, family.name
        assert values["_sum"] >= 0


def test_the_engines_tokens_add_up(llm: LLM, send: Send, server: Server) -> None:
    body = {"prompt": "word " * 100, "max_tokens": 4, "ignore_eos": True}
    before = scrape(send, server)
    prompt_tokens = 0
    for _ in range(2):  # the second finds the prompt in the cache
        prompt_tokens += send(server, "POST", "/v1/completions", body)[2]["usage"]["prompt_tokens"]
    after = scrape(send, server)
    computed = difference(after, before, "prompt_tokens_by_source_total local_compute")
    cached = difference(after, before, "prompt_tokens_by_source_total local_cache_hit")
    assert computed + cached == prompt_tokens
    assert difference(after, before, "prompt_tokens_total") == prompt_tokens
    assert 0 < cached == difference(after, before, "prompt_tokens_cached_total")
    assert difference(after, before, "prefix_cache_hits_total") == cached
    assert difference(after, before, "prefix_cache_queries_total") == prompt_tokens
    assert difference(after, before, "request_prefill_kv_computed_tokens_sum") == computed
    assert difference(after, before, "generation_tokens_total") == 8
    # Each request samples its first token where its prompt ends, and computes the three others.
    assert difference(after, before, "iteration_tokens_total_sum") == computed + 2 * 3
    assert difference(after, before, "iteration_tokens_total_count") >= 8


def test_a_request_whose_client_leaves_is_counted_as_aborted(
    llm: LLM, send: Send, server: Server, client: openai.OpenAI
) -> None:
    before = scrape(send, server)
    stream = client.completions.create(
        model="nbllm-demo",
        prompt=STORY,
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert scrape(send, server)["num_requests_running"] == 1
    stream.close()
    while (after := scrape(send, server))["num_requests_running"]:
        pass
    assert difference(after, before, "request_success_total abort") == 1
    assert difference(after, before, "request_success_total length") == 0
    assert difference(after, before, "e2e_request_latency_seconds_count") == 0


def test_requests_are_counted_by_route_and_status(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        body = {"prompt": "a", "max_tokens": 1}
        for _ in range(2):
            send(server, "POST", "/v1/completions", body)
        send(server, "POST", "/v1/completions", body | {"temperature": -1})
        send(server, "POST", "/v1/completions", body, {"Authorization": None})
        send(server, "GET", "/v1/models/nbllm-demo")
        for made_up in ("a", "b"):
            send(server, "GET", f"/{made_up}")
            send(server, made_up.upper(), "/v1/models")
        found = scrape(send, server)
    counts = {
        name.removeprefix("http_requests_total "): value
        for name, value in found.items()
        if name.startswith("http_requests_total ")
    }
    assert counts == {
        "/v1/completions POST 2xx": 2,
        "/v1/completions POST 4xx": 1,
        "none POST 4xx": 1,
        "/v1/models/{name:path} GET 2xx": 1,
        "none GET 4xx": 2,
        "/v1/models other 4xx": 2,
    }
    assert found["http_request_duration_seconds_count /v1/completions POST"] == 3
    assert found["http_request_duration_seconds_sum /v1/completions POST"] > 0


def output(ids: Mapping[int, list[int]], times: RequestMetrics, *, finished: bool) -> RequestOutput:
    choices = [CompletionOutput(index, "", token_ids) for index, token_ids in ids.items()]
    return RequestOutput("0", "a", [1, 2, 3], None, choices, finished, metrics=times)


def observed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, outputs: Any
) -> Callable[[str], tuple[float, float]]:
    """Name -> (count, sum), after `(seconds, output)` came, one after another."""
    metrics = ServerMetrics("nbllm", "x", llm.config)
    observer = metrics.follow(params)
    for now, item in outputs:
        clock = SimpleNamespace(monotonic=lambda now=now: now)
        monkeypatch.setattr(metrics_module, "time", clock)
        observer.add(item)
    return lambda name: (
        metrics._histograms[name].cumulative()[-1][1],
        pytest.approx(metrics._histograms[name].sum),
    )


def test_the_time_between_tokens_is_that_between_the_outputs_shared_out(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = RequestMetrics(10.0, 10.5, 11.0, 14.0)
    params = SamplingParams(max_tokens=9, output_kind=RequestOutputKind.DELTA)
    outputs = [
        (11.25, output({0: [5]}, times, finished=False)),
        (12.25, output({0: [5]}, times, finished=False)),
        (14.25, output({0: [5, 6]}, times, finished=False)),  # the reader was slow
        (14.5, output({0: []}, times, finished=True)),
    ]
    read = observed(llm, monkeypatch, params, outputs)
    assert read("inter_token_latency_seconds") == (3, 3.0)
    assert read("time_to_first_token_seconds") == (1, 1.25)  # when it could be sent
    assert read("e2e_request_latency_seconds") == (1, 4.0)
    assert read("request_queue_time_seconds") == (1, 0.5)
    assert read("request_prefill_time_seconds") == (1, 0.5)
    assert read("request_decode_time_seconds") == (1, 3.0)
    assert read("request_inference_time_seconds") == (1, 3.5)
    assert read("request_time_per_output_token_seconds") == (1, 1.0)
    assert read("request_generation_tokens") == (1, 4)
    assert read("request_params_max_tokens") == (1, 9)
    assert read("request_prompt_tokens") == (1, 3)


def test_a_reply_that_is_not_streamed_has_the_same_numbers(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = RequestMetrics(10.0, 10.5, 11.0, 14.0)
    params = SamplingParams(n=2, max_tokens=9, output_kind=RequestOutputKind.FINAL_ONLY)
    whole = output({0: [5, 5, 5, 5], 1: [5, 5]}, times, finished=True)
    read = observed(llm, monkeypatch, params, [(14.0, whole)])
    assert read("time_to_first_token_seconds") == (1, 1.0)
    assert read("inter_token_latency_seconds") == (4, 6.0)
    assert read("request_generation_tokens") == (1, 6)
    assert read("request_max_num_generation_tokens") == (1, 4)
    assert read("request_params_n") == (1, 2)
    assert read("request_decode_time_seconds") == (1, 3.0)


def test_what_failed_is_not_measured(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = output({0: []}, RequestMetrics(10.0), finished=True)
    failed.error = ValueError("no")
    read = observed(llm, monkeypatch, SamplingParams(), [(12.0, failed)])
    assert read("e2e_request_latency_seconds") == (0, 0)


BODIES: list[dict[str, Any]] = [
    {"prompt": "What is {i} + {i}?", "temperature": 0},
    {"prompt": ["Tell me about {i}.", "Once upon {i} times"], "max_tokens": 5},
    {"prompt": "The number {i}, Grüße, 東京", "n": 2, "temperature": 1, "seed": 1},
    {"prompt": "Count: {i}", "stop": ["e", "1"], "temperature": 1, "seed": 2, "max_tokens": 20},
    {"content": "What is {i} + 2?", "temperature": 0, "max_tokens": 12},
    {"content": "Say {i} twice, 👩‍👩‍👧.", "n": 3, "temperature": 1, "seed": 3, "max_tokens": 6},
]


def numbered(value: Any, number: int) -> Any:
    if isinstance(value, list):
        return [numbered(item, number) for item in value]
    return value.replace("{i}", str(number)) if isinstance(value, str) else value


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """(token ids and text of each choice, usage)."""
    reply = await client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    if not body["stream"]:
        whole = reply.json()
        texts = [c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]]
        ids = [choice["token_ids"] for choice in whole["choices"]]
        return list(zip(ids, texts, strict=True)), whole["usage"]
    found: dict[int, tuple[list[int], str]] = {}
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n")[:-2]]
    for (choice,) in (chunk["choices"] for chunk in chunks[:-1]):
        ids, text = found.get(choice["index"], ([], ""))
        news = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        found[choice["index"]] = ids + (choice.get("token_ids") or []), text + news
    return [found[index] for index in sorted(found)], chunks[-1]["usage"]


async def check_usage(llm: LLM, client: httpx.AsyncClient, number: int) -> tuple[int, int]:
    body = {key: numbered(v, number) for key, v in BODIES[number % len(BODIES)].items()}
    body |= {"stream": number // len(BODIES) % 2 == 1, "return_token_ids": True}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    tokenizer = llm.get_tokenizer()
    path = "/v1/chat/completions" if "content" in body else "/v1/completions"
    if "content" in body:
        body["messages"] = [{"role": "user", "content": body.pop("content")}]
        num_prompt = len(llm.encode_chat(body["messages"])["prompt_token_ids"])
    else:
        given = body["prompt"]
        prompts = given if isinstance(given, list) else [given]
        num_prompt = sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    choices, usage = await ask(client, path, body)
    for ids, text in choices:
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.startswith(text) if "stop" in body else decoded == text
    num_new = sum(len(ids) for ids, _ in choices)
    counted = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
    assert counted == (num_prompt, num_new, num_prompt + num_new), body
    return num_prompt, num_new


def check_usages(llm: LLM, send: Send, num_requests: int) -> None:
    """The usage of each reply is that of its tokens; all together they are those of /metrics."""

    async def run() -> list[tuple[int, int]]:
        limit = asyncio.Semaphore(24)

        async def one(number: int) -> tuple[int, int]:
            async with limit:
                return await check_usage(llm, client, number)

        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, timeout=300, trust_env=False
        ) as client:
            return await asyncio.gather(*map(one, range(num_requests)))

    with llm.serve() as server:
        before = scrape(send, server)
        counts = asyncio.run(run())
        after, stats = scrape(send, server), server.stats
    num_prompt, num_new = map(sum, zip(*counts, strict=True))
    assert after["request_prompt_tokens_sum"] == stats.prompt_tokens == num_prompt
    assert after["request_generation_tokens_sum"] == stats.completion_tokens == num_new
    assert difference(after, before, "generation_tokens_total") == num_new
    ended = sum(
        difference(after, before, f"request_success_total {reason}")
        for reason in ("stop", "length")
    )
    assert ended == after["request_params_n_sum"]


def test_the_usage_is_that_of_the_tokens(llm: LLM, send: Send) -> None:
    check_usages(llm, send, num_requests=36)


@pytest.mark.slow
def test_the_usage_is_that_of_the_tokens_in_a_thousand_replies(llm: LLM, send: Send) -> None:
    check_usages(llm, send, num_requests=1_000)


NAMES = ("time_to_first_token_seconds", "e2e_request_latency_seconds")


async def measure(client: httpx.AsyncClient, number: int, max_tokens: int) -> dict[str, float]:
    """What a client sees of one stream, in seconds."""
    body = {"prompt": f"{number} " * 100, "max_tokens": max_tokens, "ignore_eos": True}
    begin, came = time.monotonic(), []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                came.append(time.monotonic())
    return {NAMES[0]: came[0] - begin, NAMES[1]: came[-1] - begin}


def measure_all(server: Server, num_streams: int, max_tokens: int) -> dict[str, list[float]]:
    async def run() -> list[dict[str, float]]:
        queue = iter(range(num_streams))
        found = []

        async def worker() -> None:
            for number in queue:
                found.append(await measure(client, number, max_tokens))

        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, timeout=300, trust_env=False
        ) as client:
            await asyncio.gather(*(worker() for _ in range(4)))
        return found

    rows = asyncio.run(run())
    return {name: sorted(row[name] for row in rows) for name in NAMES}


def test_the_servers_seconds_are_within_those_of_its_clients(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        seen = measure_all(server, 8, 5)
        told = scrape(send, server)
    for name in NAMES:
        assert told[f"{name}_count"] == 8
        assert 0 < told[f"{name}_sum"] < sum(seen[name])
    assert told["inter_token_latency_seconds_count"] == 8 * 4


@pytest.mark.slow
def test_quantiles_from_metrics_are_those_that_clients_see(llm: LLM, send: Send) -> None:
    with llm.serve() as server:
        seen = measure_all(server, 200, 40)
        told = scrape(send, server)
    for name in NAMES:
        start = f"{name}_bucket "
        buckets = [(float(k[len(start) :]), v) for k, v in told.items() if k.startswith(start)]
        bounds = [bound for bound, _ in buckets]
        for quantile in (0.5, 0.99):
            rank = quantile * 200
            own = next(i for i, (_, count) in enumerate(buckets) if count >= rank)
            value = seen[name][int(rank) - 1]
            theirs = next(i for i, bound in enumerate(bounds) if value <= bound)
            print(f"{name} p{quantile * 100:g}: {value:.4f} s, up to {bounds[own]} s in /metrics")
            assert abs(own - theirs) <= 1, (name, quantile, value, bounds[own])
