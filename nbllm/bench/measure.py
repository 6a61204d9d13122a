"""Timing one workload on an engine, and checking its tokens.

The engine is timed on the whole workload, and once more with a single token per row, so that
prefill and decode can be told apart by subtraction: the same way for a peer that has no other.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbllm.bench.workloads import Workload

if TYPE_CHECKING:
    from nbllm.llm import LLM
    from nbllm.outputs import RequestOutput

_CHECKED_TOKENS = 64  # of a row


def generate(
    llm: LLM, workload: Workload, *, temperature: float = 0.0, **extra: Any
) -> list[RequestOutput]:
    """Run a workload through `LLM.generate`; raises the error of a row that failed."""
    from nbllm.sampling_params import SamplingParams

    params = {
        length: SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, **extra)
        for length in set(workload.output_lens)
    }
    rows_params = [params[length] for length in workload.output_lens]
    outputs = llm.generate(workload.prompts, rows_params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def time_workload(
    llm: LLM, workload: Workload, *, temperature: float, repeats: int, beside_python: bool = False
) -> tuple[list[RequestOutput], dict[str, Any]]:
    """Time a workload without cached prefixes.

    Args:
        llm: warm.
        workload: what is run.
        temperature: of all rows.
        repeats: medians are reported.
        beside_python: time it once more while the main thread computes in pure Python.

    Returns:
        the outputs of the last repeat, and the rates.
    """
    one_token = replace(workload, output_lens=[1] * len(workload.prompts))
    generate(llm, workload, temperature=temperature)  # compiles and captures
    prefill_times: list[float] = []
    whole_times: list[float] = []
    busy_times: list[float] = []
    outputs: list[RequestOutput] = []

    def run(job: Workload) -> None:
        outputs[:] = generate(llm, job, temperature=temperature)

    for _ in range(repeats):
        llm.reset_prefix_cache()
        prefill_times.append(_seconds(lambda: run(one_token)))
        if beside_python:
            llm.reset_prefix_cache()
            busy_times.append(_seconds(lambda: _run_beside_python(lambda: run(workload))))
        llm.reset_prefix_cache()
        whole_times.append(_seconds(lambda: run(workload)))
    whole_s = statistics.median(whole_times)
    result = rates(workload, statistics.median(prefill_times), whole_s)
    if beside_python:
        result["slowdown_beside_python"] = round(statistics.median(busy_times) / whole_s, 3)
    waits = sorted(o.metrics.first_token_time - o.metrics.arrival_time for o in outputs)
    result["ttft_s"] = {
        "mean": round(statistics.fmean(waits), 4),
        "p50": round(waits[len(waits) // 2], 4),
        "p99": round(waits[min(len(waits) * 99 // 100, len(waits) - 1)], 4),
    }
    return outputs, result


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
        "prefill_seconds": round(prefill_s, 5),
        "tokens_per_s": round(sum(workload.output_lens) / whole_s, 2),
        "rows_per_s": round(num_rows / whole_s, 3),
        "prefill_tokens_per_s": round(sum(map(len, workload.prompts)) / prefill_s, 1),
    }
    if num_decoded and whole_s > prefill_s:
        result["decode_tokens_per_s"] = round(num_decoded / (whole_s - prefill_s), 2)
    return result


def check_alone(llm: LLM, outputs: Sequence[RequestOutput], num_rows: int = 4) -> dict[str, Any]:
    """Score some rows again, each alone, in one piece and without cached prefixes.

    A greedy token must be the most likely one of its place. In half precision two computations
    round differently, and with random weights many tokens are nearly as likely as the best: then
    a token counts as wrong if it is half a nat less likely, far beyond rounding and far within
    what any other token is; and on average they must be closer than 0.02.

    Args:
        llm: what generated the outputs.
        outputs: greedy.
        num_rows: how many of them.
    """
    assert llm.config.max_model_len is not None
    rows = list(outputs)[:: max(len(outputs) // num_rows, 1)][:num_rows]
    gaps: list[float] = []
    for row in rows:
        prompt = row.prompt_token_ids
        tokens = row.outputs[0].token_ids[: llm.config.max_model_len - len(prompt) - 1]
        llm.reset_prefix_cache()
        (scored,) = generate(llm, Workload("alone", [prompt + tokens], [1]), prompt_logprobs=1)
        entries = (scored.prompt_logprobs or [])[len(prompt) :]
        for token, entry in zip(tokens, entries, strict=True):
            assert entry is not None  # only the first token of all has none
            gaps.append(max(other.logprob for other in entry.values()) - entry[token].logprob)
    is_half = llm.config.dtype != "float32"
    mean = statistics.fmean(gaps)
    return {
        "against": "the same rows scored alone",
        "tokens": len(gaps),
        "equal": sum(gap == 0.0 for gap in gaps),
        "mean_gap": round(mean, 5),
        "widest_gap": min(round(max(gaps), 4), 1e9),
        "ok": max(gaps) < (0.5 if is_half else 1e-3) and mean < 0.02,
    }


def greedy_outputs(llm: LLM, workload: Workload) -> list[RequestOutput]:
    """The beginnings of all rows without sampling, for `check_alone`."""
    llm.reset_prefix_cache()
    lens = [min(length, _CHECKED_TOKENS) for length in workload.output_lens]
    return generate(llm, replace(workload, output_lens=lens))


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _run_beside_python(work: Callable[[], None]) -> None:
    """Run work in a thread of its own while this one computes in pure Python."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    number = 0
    while thread.is_alive():
        for _ in range(1000):
            number = (number * 3 + 1) % 1_000_003
    thread.join()
    if errors:
        raise errors[0]
