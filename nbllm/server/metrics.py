"""/metrics: numbers for dashboards, under the names that vLLM's have."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nbllm.histogram import Histogram
from nbllm.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from nbllm.config import EngineConfig
    from nbllm.outputs import EmbeddingRequestOutput, RequestOutput
    from nbllm.sampling_params import SamplingParams

# What `LLM.get_metrics()` has under the same name.
_GAUGES = {
    "num_requests_running": "Requests that are in the batch.",
    "num_requests_waiting": "Requests that wait for a place in the batch.",
    "kv_cache_usage_perc": "Share of the KV cache that is used; 1 is all.",
}
_COUNTERS = {
    "prefix_cache_queries": "Tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens that were found there.",
    "num_preemptions": "Requests that gave their place up for others.",
    "prompt_tokens": "Prompt tokens, computed or found in the prefix cache.",
    "prompt_tokens_cached": "Prompt tokens that were found in the prefix cache.",
    "generation_tokens": "Tokens that were generated.",
}
_ENGINE_HISTOGRAMS = {"iteration_tokens_total": "Tokens that a step of the engine computed."}
# Families that have a label more: name -> the label; a key is `<name>_<value of the label>`.
_LABELLED: dict[str, tuple[type[Any], str, str]] = {
    "num_requests_waiting_by_reason": (
        GaugeMetricFamily,
        "reason",
        "Requests that wait for a place in the batch, by the reason.",
    ),
    "prompt_tokens_by_source": (
        CounterMetricFamily,
        "source",
        "Prompt tokens, by where they came from.",
    ),
    "request_success": (
        CounterMetricFamily,
        "finished_reason",
        "Requests that ended, by the reason.",
    ),
}
_CACHE_CONFIG = {  # label -> field of `EngineConfig`
    "block_size": "block_size",
    "cache_dtype": "kv_cache_dtype",
    "enable_prefix_caching": "enable_prefix_caching",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "kv_cache_memory_bytes": "kv_cache_memory_bytes",
    "num_gpu_blocks": "num_gpu_blocks_override",
}

# The E24 series (IEC 60063): a quantile that is interpolated between them is right to some 5%.
_STEPS = (
    *("1", "1.1", "1.2", "1.3", "1.5", "1.6", "1.8", "2", "2.2", "2.4", "2.7", "3"),
    *("3.3", "3.6", "3.9", "4.3", "4.7", "5.1", "5.6", "6.2", "6.8", "7.5", "8.2", "9.1"),
)
_SECONDS = (*(float(f"{step}e{power}") for power in range(-3, 3) for step in _STEPS), 1000.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_COUNTS = (1, 2, 5, 10, 20, 50, 100)
_HTTP = "http_request_duration_seconds"
_METHODS = frozenset(("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"))
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("From each token to the next.", _SECONDS),
    "request_time_per_output_token_seconds": ("Mean time between a request's tokens.", _SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step.", _SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _SECONDS),
    "request_inference_time_seconds": ("From the first step to the last token.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Tokens of a prompt that were not cached.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a prompt.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a prompt's longest choice.", _TOKENS),
    "request_params_n": ("The n of a request.", _COUNTS),
    "request_params_max_tokens": ("The max_tokens of a request.", _TOKENS),
}


class ServerMetrics:
    """The metrics of one server; nothing of them is global.

    Counters and gauges are the engine's, whoever uses it. Histograms are of this server's requests
    that came to their end, but for `iteration_tokens_total`, which is the engine's.

    Args:
        prefix: of all names; "vllm" is what existing dashboards read.
        model_name: a label.
        config: of the engine.
    """

    def __init__(self, prefix: str, model_name: str, config: EngineConfig) -> None:
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._config = config
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._http_seconds: dict[tuple[str, str], Histogram] = {}  # handler, method
        self._http_counts: dict[tuple[str, str, str], int] = {}  # handler, method, status

    def follow(self, params: SamplingParams) -> RequestObserver:
        """What measures one prompt; it wants to see each of its outputs."""
        return RequestObserver(self._histograms, params)

    def observe_embedding(self, output: EmbeddingRequestOutput) -> None:
        """Book a request for an embedding that has ended: it has no tokens of its own."""
        _observe(self._histograms, _input_values(output, output.metrics.finished_time))

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Book a request to the server, whatever became of it.

        Args:
            handler: path of its route, as the route has it: what clients make up is no label.
            method: HTTP's.
            status: 0 if the client left before there was one.
            seconds: until the end of the reply.
        """
        method = method if method in _METHODS else "other"
        group = f"{status // 100}xx" if status else "none"
        key = handler, method, group
        self._http_counts[key] = self._http_counts.get(key, 0) + 1
        if (handler, method) not in self._http_seconds:
            self._http_seconds[handler, method] = Histogram(_SECONDS)
        self._http_seconds[handler, method].observe(seconds)

    def text(self, engine: Mapping[str, float]) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            engine: what `LLM.get_metrics()` says now.
        """
        registry = CollectorRegistry()
        registry.register(_Now(self._families(engine)))
        return generate_latest(registry)

    def _families(self, engine: Mapping[str, float]) -> Iterator[Any]:
        names, labels = list(self._labels), list(self._labels.values())
        for kind, texts in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text in texts.items():
                family: Any = kind(f"{self._prefix}:{name}", text, labels=names)
                family.add_metric(labels, engine[name])
                yield family
        for name, (kind, label, text) in _LABELLED.items():
            family = kind(f"{self._prefix}:{name}", text, labels=[*names, label])
            for key, value in engine.items():
                if key.startswith(f"{name}_"):
                    family.add_metric([*labels, key.removeprefix(f"{name}_")], value)
            yield family
        for name, text in _ENGINE_HISTOGRAMS.items():
            start = f"{name}_bucket_"
            buckets = [
                (float(key.removeprefix(start)), value)
                for key, value in engine.items()
                if key.startswith(start)
            ]
            yield self._histogram(name, text, buckets, engine[f"{name}_sum"])
        for name, (text, _) in _HISTOGRAMS.items():
            histogram = self._histograms[name]
            yield self._histogram(name, text, histogram.cumulative(), histogram.sum)
        yield self._cache_config()
        yield from self._http_families()

    def _histogram(
        self, name: str, text: str, buckets: Iterable[tuple[float, float]], total: float
    ) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
        named = [(_bound(bound), count) for bound, count in buckets]
        family.add_metric(list(self._labels.values()), named, total)
        return family

    def _http_families(self) -> Iterator[Any]:
        """Under the names of prometheus-fastapi-instrumentator, as in vLLM: they have no prefix."""
        names = ("handler", "method", "status")
        counts = CounterMetricFamily("http_requests", "Requests to the server.", labels=names)
        for reply, count in self._http_counts.items():
            counts.add_metric(reply, count)
        yield counts
        seconds = HistogramMetricFamily(_HTTP, "Until the end of a reply.", labels=names[:2])
        for route, histogram in self._http_seconds.items():
            buckets = [(_bound(bound), count) for bound, count in histogram.cumulative()]
            seconds.add_metric(route, buckets, histogram.sum)
        yield seconds

    def _cache_config(self) -> GaugeMetricFamily:
        """As in vLLM it is 1, and its labels tell."""
        values = {label: getattr(self._config, name) for label, name in _CACHE_CONFIG.items()}
        family = GaugeMetricFamily(
            f"{self._prefix}:cache_config_info",
            "How the KV cache was set up.",
            labels=[*self._labels, *values],
        )
        family.add_metric([*self._labels.values(), *map(str, values.values())], 1)
        return family


class RequestObserver:
    """Measures one prompt of a request while its outputs come by, and books it at its end.

    Args:
        histograms: where it is booked.
        params: how it is sampled.
    """

    def __init__(self, histograms: Mapping[str, Histogram], params: SamplingParams) -> None:
        self._histograms = histograms
        self._params = params
        self._first = 0.0  # when the first output came
        self._last: dict[int, float] = {}  # number of a choice -> when its last token came
        self._num_tokens: dict[int, int] = {}  # number of a choice -> tokens so far

    def add(self, output: RequestOutput) -> None:
        """See an output, which has the tokens since the one before, or all of them."""
        now = time.monotonic()
        self._first = self._first or now
        for choice in output.outputs:
            num_new = len(choice.token_ids)
            if num_new:
                self._note(choice.index, num_new, output.metrics.first_token_time, now)
        if output.finished and output.error is None:
            self._book(output, now)

    def _note(self, index: int, num_new: int, first_token_time: float, now: float) -> None:
        self._num_tokens[index] = self._num_tokens.get(index, 0) + num_new
        last = self._last.get(index)
        self._last[index] = now
        if last is None:  # what came before the first token is not between two
            last, num_new = first_token_time or now, num_new - 1
        if num_new:  # several that come at once share the time
            latency = max(now - last, 0.0) / num_new
            self._histograms["inter_token_latency_seconds"].observe(latency, num_new)

    def _book(self, output: RequestOutput, now: float) -> None:
        times, params = output.metrics, self._params
        counts = self._num_tokens.values()
        # The times are those of the first choice: when the last of several ended is known here.
        end = times.finished_time if params.n == 1 else now
        values = _input_values(output, end) | {
            "request_generation_tokens": sum(counts),
            "request_max_num_generation_tokens": max(counts, default=0),
            "request_params_n": params.n,
        }
        if params.max_tokens is not None:
            values["request_params_max_tokens"] = params.max_tokens
        first = times.first_token_time
        if times.scheduled_time and first and end:
            streams = params.output_kind == RequestOutputKind.DELTA
            came = self._first if streams else first
            values |= {
                "time_to_first_token_seconds": came - times.arrival_time,
                "request_prefill_time_seconds": first - times.scheduled_time,
                "request_decode_time_seconds": end - first,
            }
            per_choice = sum(counts) / params.n
            if per_choice > 1:
                values["request_time_per_output_token_seconds"] = (end - first) / (per_choice - 1)
        _observe(self._histograms, values)


class _Now(Collector):
    """Families that were made for one answer."""

    def __init__(self, families: Iterator[Any]) -> None:
        self._families = families

    def describe(self) -> list[Any]:
        return []  # else they would be collected twice

    def collect(self) -> Iterator[Any]:
        return self._families


def _bound(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


def _observe(histograms: Mapping[str, Histogram], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        histograms[name].observe(max(value, 0.0))


def _input_values(output: RequestOutput | EmbeddingRequestOutput, end: float) -> dict[str, float]:
    """What can be said of every request that has ended, which it did at `end`."""
    times = output.metrics
    num_tokens = len(output.prompt_token_ids)
    values: dict[str, float] = {
        "request_prompt_tokens": num_tokens,
        "request_prefill_kv_computed_tokens": num_tokens - output.num_cached_tokens,
    }
    if times.scheduled_time and end:
        values |= {
            "e2e_request_latency_seconds": end - times.arrival_time,
            "request_queue_time_seconds": times.scheduled_time - times.arrival_time,
            "request_inference_time_seconds": end - times.scheduled_time,
        }
    return values
