"""/metrics and /load: numbers for dashboards, under the names that vLLM's have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nbllm.outputs import RequestOutput
    from nbllm.sampling_params import SamplingParams

_GAUGES = {
    "num_requests_running": "Requests that are in the batch.",
    "num_requests_waiting": "Requests that wait for a place in the batch.",
    "kv_cache_usage_perc": "Share of the KV cache that is used; 1 is all.",
}
_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that were found there.",
    "num_preemptions": "Requests that gave their place up for others.",
    "prompt_tokens": "Prompt tokens that were computed.",
    "generation_tokens": "Tokens that were generated.",
}
_SUCCESS = "request_success"

_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
_LONG_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 1200.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_COUNTS = (1, 2, 5, 10, 20, 50, 100)
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SHORT_S),
    "request_time_per_output_token_seconds": ("Mean time between a request's tokens.", _SHORT_S),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _LONG_S),
    "request_queue_time_seconds": ("From arrival to the first step.", _LONG_S),
    "request_prefill_time_seconds": ("From the first step to the first token.", _LONG_S),
    "request_decode_time_seconds": ("From the first token to the last.", _LONG_S),
    "request_inference_time_seconds": ("From the first step to the last token.", _LONG_S),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "request_params_n": ("The n of a request.", _COUNTS),
    "request_params_max_tokens": ("The max_tokens of a request.", _TOKENS),
}


class ServerMetrics:
    """The metrics of one server; nothing of them is global.

    Counters and gauges are the engine's, whoever uses it. Histograms are of this server's requests.

    Args:
        prefix: of all names; "vllm" is what existing dashboards read.
        model_name: a label.
    """

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._histograms: dict[str, Any] = {
            name: Histogram(
                f"{prefix}:{name}", text, list(self._labels), registry=self._registry,
                buckets=buckets,
            ).labels(**self._labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }  # fmt: skip

    def observe(self, output: RequestOutput, params: SamplingParams, num_tokens: int) -> None:
        """Book a request that has ended.

        Args:
            output: its last one.
            params: how it was sampled.
            num_tokens: that were generated, in all its continuations.
        """
        times = output.metrics
        begin, first, end = times.scheduled_time, times.first_token_time, times.finished_time
        values: dict[str, float] = {
            "request_prompt_tokens": len(output.prompt_token_ids),
            "request_generation_tokens": num_tokens,
            "request_params_n": params.n,
        }
        if params.max_tokens is not None:
            values["request_params_max_tokens"] = params.max_tokens
        if begin and first and end:
            values |= {
                "time_to_first_token_seconds": first - times.arrival_time,
                "e2e_request_latency_seconds": end - times.arrival_time,
                "request_queue_time_seconds": begin - times.arrival_time,
                "request_prefill_time_seconds": first - begin,
                "request_decode_time_seconds": end - first,
                "request_inference_time_seconds": end - begin,
            }
            per_choice = num_tokens / params.n
            if per_choice > 1:
                values["request_time_per_output_token_seconds"] = (end - first) / (per_choice - 1)
        for name, value in values.items():
            self._histograms[name].observe(max(value, 0.0))

    def text(self, engine: Mapping[str, float]) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            engine: what `LLM.get_metrics()` says now.
        """
        now = CollectorRegistry()
        now.register(_EngineCollector(self._prefix, self._labels, engine))
        return generate_latest(now) + generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's counters and gauges at one moment."""

    def __init__(self, prefix: str, labels: Mapping[str, str], values: Mapping[str, float]) -> None:
        self._prefix = prefix
        self._labels = labels
        self._values = values

    def collect(self) -> Iterable[Any]:
        names, labels = list(self._labels), list(self._labels.values())
        for kind, texts in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text in texts.items():
                family: Any = kind(f"{self._prefix}:{name}", text, labels=names)
                family.add_metric(labels, self._values.get(name, 0))
                yield family
        family = CounterMetricFamily(
            f"{self._prefix}:{_SUCCESS}",
            "Requests that ended, by the reason.",
            labels=[*names, "finished_reason"],
        )
        for key, value in self._values.items():
            if key.startswith(f"{_SUCCESS}_"):
                family.add_metric([*labels, key.removeprefix(f"{_SUCCESS}_")], value)
        yield family
