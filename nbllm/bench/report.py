"""What a run says of itself: a table for people, and where and with what it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbllm.llm import LLM

_PACKAGES = ("nbllm", "torch", "triton", "transformers")
_SERVER_PACKAGES = ("fastapi", "uvicorn", "h11", "httptools", "uvloop")


def table(result: dict[str, Any]) -> str:
    """The result of a run as Markdown."""
    ceilings = result["ceilings"]
    lines = [
        f"{result['model']}, {result['dtype']}, temperature {result['temperature']:g}, on "
        f"{result['device']} (reads {ceilings['read_gb_per_s']:,.0f} GB/s, multiplies "
        f"{ceilings['matmul_tflop_per_s']:,.1f} TFLOP/s); import to first token "
        f"{result['import_to_first_token_s']:.1f} s; commit {result['commit']}, "
        f"{_listed(result['versions'])}",
        "",
        "| Workload | Measured | Of the roofline | First token of a row, median | Check |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(item) for item in result["workloads"]]
    return "\n".join(lines) + "\n"


def _row(item: dict[str, Any]) -> str:
    rate, unit, roofline = {
        "frame": ("rows_per_s", "rows/s", "of_roofline"),
        "prefill": ("prefill_tokens_per_s", "prompt tokens/s", "prefill_of_roofline"),
    }.get(item["workload"], ("tokens_per_s", "tokens/s", "of_roofline"))
    measured = f"{item[rate]:,.0f} {unit}" if item[rate] >= 100 else f"{item[rate]:.1f} {unit}"
    slowdown = item.get("slowdown_beside_python")
    if slowdown is not None:
        measured += f"; {slowdown:.2f}x as long beside a Python loop"
    check = item["check"]
    verdict = "ok" if check["ok"] else f"FAILED: {check['widest_gap']}"
    total = check["tokens"]
    return (
        f"| {item['workload']}: {item['num_prompts']:,} prompts, {item['prompt_tokens']:,} tokens "
        f"in, {item['output_tokens']:,} out | {measured} | {item[roofline]:.0%} | "
        f"{item['ttft_s']['p50'] * 1e3:.1f} ms | {verdict}, {check['equal']} of {total} equal to "
        f"{check['against']} |"
    )


def environment(llm: LLM) -> dict[str, Any]:
    """Device, versions and commit."""
    import torch

    device = torch.device(llm.config.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": llm.config.dtype,
        **_software(_PACKAGES),
    }


def machine() -> dict[str, Any]:
    """Processor, versions and commit of a run that has no engine in this process."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), **_software(_PACKAGES + _SERVER_PACKAGES)}


def serve_table(result: dict[str, Any]) -> str:
    """The result of `nbllm bench --serve` as Markdown."""
    lines = [
        f"{result['model']}, {result['dtype']}, {result['endpoint']}, {result['max_tokens']} "
        f"tokens each, on {result['cpu']}, {result['cores']} cores, device {result['device']}; "
        f"commit {result['commit']}, {_listed(result['versions'])}",
        "",
        "| Server | Streams at a time, in all | Tokens/s | First text, p50 and p99 | Between two "
        "pieces | CPU per token: process, of it the server | Client | Errors, wrong texts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_serve_row(run) for run in result["serve"]]
    if "ratio" in result:
        ratio = result["ratio"]
        own = "unknown" if ratio["server"] is None else f"{ratio['server']:.2f}"
        lines += [
            "",
            f"nbllm over its peer, CPU time per token with as many streams at a time: {own} for "
            f"the server without the model, {ratio['process']:.2f} for the process",
        ]
    return "\n".join(lines) + "\n"


def _serve_row(run: dict[str, Any]) -> str:
    cpu = run["cpu_us_per_token"]
    own = "unknown" if cpu["server"] is None else f"{cpu['server']:,.0f} us"
    failures = f"{run['errors']}, {run['wrong_texts']}"
    if run["first_error"] is not None:
        failures += f": {run['first_error']:.60}".replace("|", "/")
    return (
        f"| {run['server']} | {run['concurrency']:,}, {run['requests']:,} "
        f"| {run['tokens_per_s']:,.0f} | {_ms(run['ttft_s'])} | {_ms(run['inter_token_s'])} "
        f"| {cpu['process']:,.0f} us, {own} | {cpu['client']:,.0f} us | {failures} |"
    )


def _ms(spread: dict[str, float | None]) -> str:
    if spread["p50"] is None or spread["p99"] is None:
        return "none"
    return f"{spread['p50'] * 1e3:,.1f} ms, {spread['p99'] * 1e3:,.1f} ms"


def _software(packages: tuple[str, ...]) -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "commit": _commit(),
    }


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


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
