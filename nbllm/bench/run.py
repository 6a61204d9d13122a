"""One benchmark run: load, time, check, report.

The engine is timed on the whole workload, and once more with a single token per row, so that
prefill and decode can be told apart by subtraction: the same way for a peer that has no other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbllm.bench.workloads import SHAPES, WORKLOADS, Workload, make_workload, write_config

if TYPE_CHECKING:
    from nbllm.llm import LLM
    from nbllm.outputs import RequestOutput

_PACKAGES = ("nbllm", "torch", "triton", "transformers")
_PEERS = ("transformers", "llama.cpp")
_ENGINE_OPTIONS = {
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "block_size": int,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm bench`."""
    parser.add_argument("--model", help="folder or name on the hub; default: the bundled model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--load-format", default="auto", help="auto, safetensors, pt or dummy")
    parser.add_argument("--workload", choices=WORKLOADS, default="batch")
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--input-len", type=int)
    parser.add_argument("--output-len", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--batch-invariant", action="store_true")
    for name, kind in _ENGINE_OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind)
    parser.add_argument(
        "--peer",
        choices=_PEERS,
        action="append",
        default=[],
        help="time another engine on the same weights, too; may be given twice. transformers "
        "checks our tokens as well",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; the last line of standard output is the result as JSON.

    Returns:
        0, or 1 if the check of the tokens failed.
    """
    with ExitStack() as stack:
        folder, load_format = _model_source(arguments, stack)
        start = time.perf_counter()
        from nbllm.llm import LLM

        llm = LLM(
            folder,
            load_format=load_format,
            skip_tokenizer_init=True,
            **_engine_options(arguments),
        )
        stack.enter_context(llm)
        loaded = time.perf_counter()
        _generate(llm, Workload("first", [[1, 2, 3, 4]], [1]))
        first_token = time.perf_counter()
        workload = make_workload(
            arguments.workload,
            num_prompts=arguments.num_prompts,
            input_len=arguments.input_len,
            output_len=arguments.output_len,
            vocab_size=llm.model_config.vocab_size,
        )
        _say(f"{llm!r}: {workload.name}, {len(workload.prompts)} prompts")
        result: dict[str, Any] = {
            "model": arguments.shape or arguments.model or "demo",
            "workload": workload.name,
            "num_prompts": len(workload.prompts),
            "prompt_tokens": sum(map(len, workload.prompts)),
            "output_tokens": sum(workload.output_lens),
            "load_s": round(loaded - start, 3),
            "import_to_first_token_s": round(first_token - start, 3),
        }
        outputs, timing = _time(llm, workload, arguments.repeats)
        result |= timing
        if arguments.peer:
            result["peers"] = _run_peers(llm, folder, workload, outputs, arguments, result)
        if "transformers" not in arguments.peer:
            result["check"] = _check_alone(llm, outputs)
        result |= _environment(llm)
    _print(json.dumps(result))
    return 0 if result["check"]["ok"] else 1


def _model_source(arguments: argparse.Namespace, stack: ExitStack) -> tuple[Path | str | None, str]:
    """The model's folder or name, and its load format."""
    if arguments.shape is None:
        return arguments.model, arguments.load_format
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_config(arguments.shape, folder)
    if arguments.peer:
        from nbllm.bench.peer import write_random_weights

        _say("writing a checkpoint of random weights, for both engines to load")
        write_random_weights(folder)
        return folder, "auto"
    return folder, "dummy"


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "enforce_eager": arguments.enforce_eager,
        "enable_prefix_caching": not arguments.no_enable_prefix_caching,
        "batch_invariant": arguments.batch_invariant,
    }
    given = {name: getattr(arguments, name) for name in _ENGINE_OPTIONS}
    return options | {name: value for name, value in given.items() if value is not None}


def _generate(llm: LLM, workload: Workload, **extra: Any) -> list[RequestOutput]:
    from nbllm.sampling_params import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, **extra)
        for length in workload.output_lens
    ]
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def _time(llm: LLM, workload: Workload, repeats: int) -> tuple[list[RequestOutput], dict[str, Any]]:
    """The outputs of the last repeat, and the medians."""
    one_token = replace(workload, output_lens=[1] * len(workload.prompts))
    _generate(llm, replace(workload, output_lens=[min(n, 4) for n in workload.output_lens]))
    prefill_times: list[float] = []
    whole_times: list[float] = []
    outputs: list[RequestOutput] = []
    for _ in range(repeats):
        for job, times in ((one_token, prefill_times), (workload, whole_times)):
            llm.reset_prefix_cache()
            begin = time.perf_counter()
            outputs = _generate(llm, job)
            times.append(time.perf_counter() - begin)
    result = rates(workload, statistics.median(prefill_times), statistics.median(whole_times))
    waits = sorted(o.metrics.first_token_time - o.metrics.arrival_time for o in outputs)
    result["ttft_s"] = {
        "mean": round(statistics.fmean(waits), 4),
        "p50": round(waits[len(waits) // 2], 4),
        "p99": round(waits[min(len(waits) * 99 // 100, len(waits) - 1)], 4),
    }
    return outputs, result


def _run_peers(
    llm: LLM,
    folder: Path | str | None,
    workload: Workload,
    outputs: Sequence[RequestOutput],
    arguments: argparse.Namespace,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Rates of each peer and ours over them; transformers' check of our tokens into `result`."""
    from nbllm.bench.peer import (
        TransformersPeer,
        check_tokens,
        count_equal_tokens,
        load_peer,
        time_peer,
    )
    from nbllm.hub import resolve_model

    peers: dict[str, Any] = {}
    for name in arguments.peer:
        peer = load_peer(name, resolve_model(folder), llm.config.device, llm.config.dtype)
        _say(f"{name}: the same")
        if isinstance(peer, TransformersPeer):
            result["check"] = check_tokens(peer.model, outputs)
        peers[name] = measured = time_peer(peer, workload, arguments.repeats)
        measured["equal_tokens"] = count_equal_tokens(outputs, measured.pop("tokens"))
        measured["ratio"] = {
            rate: round(result[rate] / measured[rate], 2)
            for rate in ("tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s")
            if measured.get(rate)
        }
        del peer  # its weights, before the next one's
    return peers


def rates(workload: Workload, prefill_s: float, whole_s: float) -> dict[str, Any]:
    """Tokens and rows per second.

    Args:
        workload: what was run.
        prefill_s: seconds for one token per row.
        whole_s: seconds for the whole of it.
    """
    num_rows = len(workload.prompts)
    num_decoded = sum(workload.output_lens) - num_rows
    result: dict[str, Any] = {
        "seconds": round(whole_s, 4),
        "tokens_per_s": round(sum(workload.output_lens) / whole_s, 2),
        "rows_per_s": round(num_rows / whole_s, 3),
        "prefill_tokens_per_s": round(sum(map(len, workload.prompts)) / prefill_s, 1),
    }
    if num_decoded and whole_s > prefill_s:
        result["decode_tokens_per_s"] = round(num_decoded / (whole_s - prefill_s), 2)
    return result


def _check_alone(llm: LLM, outputs: Sequence[RequestOutput], num_rows: int = 4) -> dict[str, Any]:
    """Generate some rows again, alone and without cached prefixes, and compare.

    In half precision a row may take another turn where two tokens are nearly tied: a first
    difference counts as wrong if the two log-probabilities are more than 0.05 apart.
    """
    rows = list(outputs)[:: max(len(outputs) // num_rows, 1)][:num_rows]
    num_equal, widest = 0, 0.0
    for row in rows:
        tokens = row.outputs[0].token_ids
        llm.reset_prefix_cache()
        again = Workload("alone", [row.prompt_token_ids], [len(tokens)])
        alone = _generate(llm, again, logprobs=5)[0].outputs[0]
        assert alone.logprobs is not None
        differing = [i for i, token in enumerate(alone.token_ids) if token != tokens[i]]
        if not differing:
            num_equal += 1
            continue
        entry = alone.logprobs[differing[0]]
        best = entry[alone.token_ids[differing[0]]].logprob
        other = entry.get(tokens[differing[0]])
        widest = max(widest, best - other.logprob if other is not None else float("inf"))
    return {
        "against": "the same rows alone",
        "rows": len(rows),
        "equal": num_equal,
        "widest_gap": min(round(widest, 4), 1e9),
        "ok": widest < 0.05,
    }


def _environment(llm: LLM) -> dict[str, Any]:
    import torch

    device = torch.device(llm.config.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": llm.config.dtype,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source, with a "+" if it was changed since; None outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
