"""`nbllm bench --serve`: many streams at a time from a real server, and what each token costs it.

The server runs in a process of its own, and this process is the client. First each prompt is asked
alone; then all of them at once, and each text must be the same again, so that none is cut, changed
or another's. The prompts are stories, which the bundled model tells for more than 64 tokens.

The CPU time of the server's process is divided into that of the model's threads and that of the
server's own, see `nbllm.bench.cpu_times`; the client's is apart. It covers all of a request, from
the connection to the last byte, and is divided by the tokens that were asked for. Other programs on
the machine raise it, by the caches that they take, and tokens per second and latencies suffer far
more: what counts is the ratio of one run.

`--peer transformers` measures `nbllm.bench.fastapi_peer` in the same way, with fewer streams at a
time, as it does not batch, and by turns with this server under the same load. With `--dtype auto`
the peer has the checkpoint's dtype, and the engine may have a faster one: the models' times differ,
then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nbllm.bench.cpu_times import CpuTimes
from nbllm.bench.report import machine, serve_table
from nbllm.bench.server_process import ServerProcess
from nbllm.bench.stream_client import Stream, run_streams
from nbllm.errors import InvalidRequestError

DEFAULTS = {"concurrency": 64, "requests": None, "max_tokens": 64, "peer_concurrency": 8}
ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
# The bundled model tells a different story about each of them, as a chat and as a completion.
_HEROES = """
    ant bee bird cat cow crab dog donkey duck farmer frog girl hen king lion mouse otter owl parrot
    pig princess rabbit robot sailor sheep spider tiger wolf zebra
""".split()  # noqa: SIM905
_TURNS = 4  # of the comparison with a peer
_SPARE_REQUESTS = 8


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm bench --serve`; without it they are errors."""
    parser.add_argument(
        "--serve", action="store_true", help="measure a server and its streams instead"
    )
    group = parser.add_argument_group("--serve")
    group.add_argument("--concurrency", type=int, help="streams at a time; default: 64")
    group.add_argument("--requests", type=int, help="streams in all; default: twice as many")
    group.add_argument("--max-tokens", type=int, help="of each stream, no fewer; default: 64")
    group.add_argument("--endpoint", choices=ENDPOINTS, help="default: chat")
    group.add_argument(
        "--peer-concurrency", type=int, help="streams at a time of the comparison; default: 8"
    )


def check_serve_arguments(arguments: argparse.Namespace) -> None:
    """Fill in the defaults.

    Raises:
        InvalidRequestError: an option has a wrong value, or does not go together with `--serve`.
    """
    if not arguments.serve:
        for name in (*DEFAULTS, "endpoint"):
            if getattr(arguments, name) is not None:
                raise InvalidRequestError(f"{_flag(name)} needs --serve", parameter=name)
        return
    for name, default in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif getattr(arguments, name) < 1:
            raise InvalidRequestError(f"{_flag(name)} must be at least 1", parameter=name)
    arguments.requests = arguments.requests or 2 * arguments.concurrency
    arguments.endpoint = arguments.endpoint or "chat"
    if arguments.shape is not None:
        raise InvalidRequestError("--serve needs a model with a tokenizer", parameter="shape")
    if arguments.temperature:
        raise InvalidRequestError("--serve checks greedy texts only", parameter="temperature")
    if "llama.cpp" in arguments.peer:
        raise InvalidRequestError("the peer of --serve is transformers", parameter="peer")


def run_serve(arguments: argparse.Namespace, engine_options: dict[str, Any]) -> int:
    """Run the benchmark; the last line of standard output is the result as JSON.

    Args:
        arguments: of `check_serve_arguments`.
        engine_options: of `LLM`, passed on to `nbllm serve`.

    Returns:
        0, or 1 if a stream failed or had another text than alone.
    """
    at_once = arguments.concurrency
    limit = ["--max-concurrent-requests", str(at_once + _SPARE_REQUESTS)]
    options = [*_flags(engine_options), *limit, "--load-format", arguments.load_format]
    few = min(arguments.peer_concurrency, at_once)
    with ExitStack() as stack:
        ours = _Server.start("nbllm", arguments, options, stack)
        loads = [_Load(ours, at_once, arguments)]
        loads[0].run(range(arguments.requests))
        if arguments.peer:
            peer_options = _flags({name: engine_options[name] for name in ("device", "dtype")})
            peer = _Server.start("transformers", arguments, peer_options, stack)
            pair = [_Load(server, few, arguments) for server in (ours, peer)]
            for number in range(_TURNS):  # so that what else the machine does meets both
                for load in pair:
                    load.run(range(number * few, (number + 1) * few))
            loads += pair
    runs = [load.report() for load in loads]
    result: dict[str, Any] = {
        "model": arguments.model or "demo",
        "endpoint": ENDPOINTS[arguments.endpoint],
        "max_tokens": arguments.max_tokens,
        "device": engine_options["device"],
        "dtype": engine_options["dtype"],
        "serve": runs,
        **machine(),
    }
    if arguments.peer:
        result["ratio"] = _ratios(runs[-2], runs[-1])
    sys.stdout.write(serve_table(result) + "\n" + json.dumps(result) + "\n")
    return int(any(run["errors"] or run["wrong_texts"] for run in runs))


@dataclass(frozen=True, slots=True)
class _Server:
    """A server that runs, and what it says to each prompt alone."""

    kind: str
    process: ServerProcess
    alone: list[Stream]

    @classmethod
    def start(
        cls, kind: str, arguments: argparse.Namespace, options: Sequence[str], stack: ExitStack
    ) -> _Server:
        """Start it with its own options until `stack` is left, and ask it."""
        _say(f"{kind}: starting")
        model = [] if arguments.model is None else ["--model", arguments.model]
        process = stack.enter_context(ServerProcess(kind, [*model, *options]))
        _say(f"{kind}: each prompt alone")
        most = max(arguments.requests, _TURNS * arguments.peer_concurrency * bool(arguments.peer))
        num_prompts = min(most, len(_HEROES))
        server = cls(kind, process, [])
        server.alone.extend(server.ask(range(num_prompts), 1, arguments)[0])
        return server

    def ask(
        self, numbers: range, concurrency: int, arguments: argparse.Namespace
    ) -> tuple[list[Stream], float, float]:
        """The requests of these numbers; see `run_streams`."""
        bodies = [make_body(arguments.endpoint, i, arguments.max_tokens) for i in numbers]
        streams, seconds, client_s = run_streams(
            self.process.url + ENDPOINTS[arguments.endpoint],
            bodies,
            concurrency=concurrency,
            api_key=self.process.api_key,
        )
        for number, stream in zip(numbers, streams, strict=True):
            stream.number = number
        fail_short(streams, arguments.max_tokens)
        return streams, seconds, client_s


class _Load:
    """Streams of one server, so many at a time, in one turn or several, and what they cost."""

    def __init__(self, server: _Server, concurrency: int, arguments: argparse.Namespace) -> None:
        self._server = server
        self._concurrency = concurrency
        self._arguments = arguments
        self._streams: list[Stream] = []
        self._seconds = self._client_s = 0.0
        self._used = CpuTimes(0.0, 0.0)

    def run(self, numbers: range) -> None:
        """One turn."""
        _say(f"{self._server.kind}: {len(numbers)} streams, {self._concurrency} at a time")
        before = self._server.process.cpu_times()
        streams, seconds, client_s = self._server.ask(numbers, self._concurrency, self._arguments)
        self._used += self._server.process.cpu_times() - before
        self._streams += streams
        self._seconds += seconds
        self._client_s += client_s

    def report(self) -> dict[str, Any]:
        """All turns together."""
        max_tokens = self._arguments.max_tokens
        num_tokens = len(self._streams) * max_tokens
        used = self._used
        return {
            "server": self._server.kind,
            "concurrency": self._concurrency,
            "requests": len(self._streams),
            **latencies(self._streams, max_tokens, self._seconds),
            **check_texts(self._streams, self._server.alone),
            "cpu_us_per_token": {
                "process": _us(used.process, num_tokens),
                "server": None if used.server is None else _us(used.server, num_tokens),
                "client": _us(self._client_s, num_tokens),
            },
        }


def make_body(endpoint: str, number: int, max_tokens: int) -> dict[str, Any]:
    """Request `number`; there are 29 different prompts, which come one after the other."""
    prompt = f"Tell me a story about a {_HEROES[number % len(_HEROES)]}."
    asked: dict[str, Any] = {"prompt": prompt}
    if endpoint == "chat":
        asked = {"messages": [{"role": "user", "content": prompt}]}
    options = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    return asked | options | {"stream_options": {"include_usage": True}}


def fail_short(streams: Sequence[Stream], max_tokens: int) -> None:
    """Set the error of streams that had fewer tokens than they were asked for."""
    for stream in streams:
        if stream.error is None and stream.num_tokens not in (None, max_tokens):
            stream.error = f"{stream.num_tokens} tokens instead of {max_tokens}"


def check_texts(streams: Sequence[Stream], alone: Sequence[Stream]) -> dict[str, Any]:
    """Compare each text with that of the same prompt alone.

    Args:
        streams: of many requests, whose prompts come in turn.
        alone: of each prompt once; one that failed here is an error, too.

    Returns:
        `errors`; `wrong_texts`, and how many of these are another prompt's (`mixed_up`);
        `distinct_texts`: the more there are, the more a mix-up would be noticed; `first_error`.
    """
    expected = [stream.text for stream in alone]
    failed = [stream for stream in (*alone, *streams) if stream.error is not None]
    wrong = [
        stream
        for stream in streams
        if stream.error is None and stream.text != expected[stream.number % len(_HEROES)]
    ]
    return {
        "errors": len(failed),
        "first_error": failed[0].error if failed else None,
        "wrong_texts": len(wrong),
        "mixed_up": sum(stream.text in expected for stream in wrong),
        "distinct_texts": len(set(expected)),
    }


def latencies(streams: Sequence[Stream], max_tokens: int, seconds: float) -> dict[str, Any]:
    """Rates and waiting times of the streams that came to their end.

    `ttft_s` is from the sending of a request to its first text; `inter_token_s` is between two
    pieces of text, of which there are `pieces_per_token`: fewer than one if the client or the
    server was late and several tokens came together, or if a token has no text of its own.
    """
    whole = [stream for stream in streams if stream.error is None and stream.times]
    num_tokens = len(whole) * max_tokens
    waits = [stream.times[0] - stream.started for stream in whole]
    gaps = [
        later - earlier
        for stream in whole
        for earlier, later in zip(stream.times, stream.times[1:], strict=False)
    ]
    num_pieces = sum(len(stream.times) for stream in whole)
    return {
        "seconds": round(seconds, 3),
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds, 1),
        "pieces_per_token": round(num_pieces / num_tokens, 3) if whole else 0.0,
        "ttft_s": _spread(waits),
        "inter_token_s": _spread(gaps),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    ordered = sorted(values)
    last = min(len(ordered) * 99 // 100, len(ordered) - 1)
    return {"p50": round(statistics.median(ordered), 5), "p99": round(ordered[last], 5)}


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float | None]:
    """Our CPU time per token over the peer's, of the server alone and with the model."""
    pairs = {
        name: (ours["cpu_us_per_token"][name], peer["cpu_us_per_token"][name])
        for name in ("server", "process")
    }
    return {
        name: round(mine / other, 3) if other else None for name, (mine, other) in pairs.items()
    }


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _us(seconds: float, num_tokens: int) -> float:
    return round(seconds / num_tokens * 1e6, 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flags(options: dict[str, Any]) -> list[str]:
    """Options of an `LLM` as those of a command line."""
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(_flag(name) if value else _flag("no_" + name))
        else:
            flags += [_flag(name), str(value)]
    return flags
