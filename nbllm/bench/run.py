"""One benchmark run: load, time, check, report.

Standard output gets a table, ready for a README, and as its last line the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbllm.bench.measure import check_alone, generate, greedy_outputs, time_workload
from nbllm.bench.report import environment, table
from nbllm.bench.serve_bench import add_serve_arguments, check_serve_arguments, run_serve
from nbllm.bench.workloads import SHAPES, WORKLOADS, Workload, make_workload, write_config
from nbllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from nbllm.bench.roofline import Ceilings
    from nbllm.llm import LLM
    from nbllm.outputs import RequestOutput

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
    parser.add_argument("--workload", choices=WORKLOADS, default=["batch"], nargs="+")
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--input-len", type=int)
    parser.add_argument("--output-len", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--beside-python",
        action="store_true",
        help="time everything once more while the main thread computes in pure Python",
    )
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
    add_serve_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; the last line of standard output is the result as JSON.

    Returns:
        0, or 1 if a check of the tokens failed.

    Raises:
        InvalidRequestError: options that do not go together.
        NbllmError: the model can't be loaded, or a server ended.
    """
    check_serve_arguments(arguments)
    if arguments.serve:
        return run_serve(arguments, _engine_options(arguments))
    if arguments.peer and arguments.temperature:
        raise InvalidRequestError("peers are timed without sampling", parameter="temperature")
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
        generate(llm, Workload("first", [[1, 2, 3, 4]], [1]))
        first_token = time.perf_counter()
        import torch

        from nbllm.bench.roofline import measure_ceilings

        device, dtype = torch.device(llm.config.device), getattr(torch, llm.config.dtype)
        ceilings = measure_ceilings(device, dtype)
        result: dict[str, Any] = {
            "model": arguments.shape or arguments.model or "demo",
            "temperature": arguments.temperature,
            "load_s": round(loaded - start, 3),
            "import_to_first_token_s": round(first_token - start, 3),
            "ceilings": {
                "read_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
                "matmul_tflop_per_s": round(ceilings.flops_per_s / 1e12, 2),
            },
            "workloads": [
                _run_workload(llm, folder, name, arguments, ceilings) for name in arguments.workload
            ],
            **environment(llm),
        }
    _print(table(result))
    _print(json.dumps(result))
    return 0 if all(item["check"]["ok"] for item in result["workloads"]) else 1


def _run_workload(
    llm: LLM,
    folder: Path | str | None,
    name: str,
    arguments: argparse.Namespace,
    ceilings: Ceilings,
) -> dict[str, Any]:
    workload = make_workload(
        name,
        num_prompts=arguments.num_prompts,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        vocab_size=llm.model_config.vocab_size,
    )
    _say(f"{llm!r}: {workload.name}, {len(workload.prompts)} prompts")
    outputs, timing = time_workload(
        llm,
        workload,
        temperature=arguments.temperature,
        repeats=arguments.repeats,
        beside_python=arguments.beside_python,
    )
    result: dict[str, Any] = {
        "workload": workload.name,
        "num_prompts": len(workload.prompts),
        "prompt_tokens": sum(map(len, workload.prompts)),
        "output_tokens": sum(workload.output_lens),
        **timing,
    }
    result |= _rooflines(llm, workload, ceilings, timing)
    if arguments.temperature:
        outputs = greedy_outputs(llm, workload)
    if arguments.peer:
        result["peers"] = _run_peers(llm, folder, workload, outputs, arguments, result)
    if "transformers" not in arguments.peer:
        result["check"] = check_alone(llm, outputs)
    return result


def _rooflines(
    llm: LLM, workload: Workload, ceilings: Ceilings, timing: dict[str, Any]
) -> dict[str, float]:
    """Ideal time over measured time, of the whole workload and of its first tokens."""
    import torch

    from nbllm.bench.roofline import Costs, ideal_seconds

    costs = Costs.of(llm.model_config, getattr(torch, llm.config.dtype))
    assert llm.config.max_num_seqs is not None
    one_token = replace(workload, output_lens=[1] * len(workload.prompts))
    return {
        f"{prefix}of_roofline": round(
            ideal_seconds(job, costs, ceilings, max_num_seqs=llm.config.max_num_seqs)
            / timing[f"{prefix}seconds"],
            4,
        )
        for prefix, job in (("", workload), ("prefill_", one_token))
    }


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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
