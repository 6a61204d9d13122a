"""df.llm beside openaivec and lotus: rows/s, and the rows that bad rows and Ctrl-C leave.

    python3.11 -m venv compare && . compare/bin/activate
    pip install openaivec lotus-ai 'pyarrow<24' -e .   # lotus needs numpy 1, pyarrow 24 has numpy 2
    python examples/compare_dataframes.py --rows 2000

All ask the bundled model for greedy texts: nbllm in its own process, the others through
`llm.serve()` in this one, each with the concurrency that it has by default. Every measurement is a
process of its own. What a tool sends differs, so nbllm also answers the very messages that it sent:
the speed can then be compared, and the texts must be equal. The last line is JSON.

- speed: distinct questions, after eight others; CPU time is that of tool and server together, and
  hardly depends on what else the machine does.
- failures: twenty rows, one of them bad, for each kind of bad row: which others are answered?
- interrupt: Ctrl-C once a third of the rows has ended: how many does the user still have? And with
  the tool's cache (nbllm: a journal), how many does the same call not ask for again?

openaivec writes its rows into one prompt, in an envelope of a thousand of the bundled model's
tokens. So that they fit, the model's context is stretched from 1,024 to 4,096 tokens, for all. So
that so small a model can fill the envelope in, a schema with the rows' ids replaces openaivec's
own, and bodies have 4 letters at most; with more rows a request (`--batch-size`) it was no faster.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from compared_tools import CONTEXT, Lotus, Nbllm, Openaivec

TOOLS = ("nbllm", "openaivec", "lotus")
PACKAGES = {"nbllm": "nbllm", "openaivec": "openaivec", "lotus": "lotus-ai"}
BAD_ROWS = {
    "missing": None,
    "empty": "",
    "number": 7,
    "too long": "word " * 2 * CONTEXT,
}
GOOD_ROWS = 19


def questions(count: int, first: int = 0) -> list[str]:
    """Distinct questions that the bundled model can answer."""
    return [f"What is {n % 100} + {n // 100 % 100}?" for n in range(first, first + count)]


def measure_speed(tool: Any, task: dict[str, Any]) -> dict[str, Any]:
    tool.ask(questions(8, first=9_900))
    tool.recorded.clear()
    found = _timed(tool.ask, questions(task["rows"]), task["rows"])
    Path(task["file"]).write_text(json.dumps(tool.recorded))
    return found


def measure_replay(tool: Any, task: dict[str, Any]) -> dict[str, Any]:
    requests = json.loads(Path(task["file"]).read_text())
    tool.replay(requests[:8])
    return _timed(tool.replay, requests, task["rows"])


def _timed(ask: Callable[[list[Any]], list[Any]], prompts: list[Any], rows: int) -> dict[str, Any]:
    started, busy = time.perf_counter(), time.process_time()
    texts = ask(prompts)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return {"rows_per_s": round(rows / seconds, 1), "cpu_s": busy, "texts": texts}


def measure_failures(tool: Any, task: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for kind, bad in BAD_ROWS.items():
        cells: list[Any] = questions(GOOD_ROWS)
        cells.insert(GOOD_ROWS // 2, bad)
        why = None
        try:
            answers = tool.ask(cells)
        except Exception as error:  # whatever a tool raises is what the user gets
            answers, why = [None] * len(cells), type(error).__name__
        is_answered = [isinstance(answer, str) for answer in answers]
        answers_bad = is_answered.pop(GOOD_ROWS // 2)
        found[kind] = {"answered": sum(is_answered), "bad_answered": answers_bad, "error": why}
    return found


def measure_interrupt(tool: Any, task: dict[str, Any]) -> dict[str, Any]:
    count = task["interrupt_rows"]
    found: dict[str, Any] = {"rows": count}
    for keep in (False, True):
        cells = questions(count, first=5_000 + 1_000 * keep)
        tool.ask(questions(8, first=9_900))
        pressed = _press_ctrl_c(tool.num_done, count // 3)
        try:
            tool.ask(cells, keep=keep)
        except KeyboardInterrupt:
            seconds = time.perf_counter() - pressed["at"]
        else:
            raise RuntimeError("Ctrl-C came too late: raise --interrupt-rows")
        before = _settled(tool.num_done)
        case = {"ended": pressed["done"], "seconds": round(seconds, 2)}
        if keep:
            tool.ask(cells, keep=True)
            case["kept"] = count - (_settled(tool.num_done) - before)
        else:
            case["kept"] = sum(isinstance(answer, str) for answer in tool.partial())
        found["cache" if keep else "plain"] = case
    return found


def _settled(num_done: Callable[[], int]) -> int:
    """How many rows have ended once no row has for two seconds: threads may outlive Ctrl-C."""
    last, since = num_done(), time.perf_counter()
    while time.perf_counter() - since < 2:
        time.sleep(0.1)
        if (done := num_done()) != last:
            last, since = done, time.perf_counter()
    return last


def _press_ctrl_c(num_done: Callable[[], int], rows: int) -> dict[str, Any]:
    """SIGINT to this process once so many more rows have ended; when, and how many, comes later."""
    pressed: dict[str, Any] = {}
    first = num_done()

    def watch() -> None:
        while (done := num_done() - first) < rows:
            time.sleep(0.02)
        pressed.update(done=done, at=time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    return pressed


PHASES = {
    "speed": measure_speed,
    "replay": measure_replay,
    "failures": measure_failures,
    "interrupt": measure_interrupt,
}


def in_child(tool: str, phase: str, task: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own; {"error": ...} if that ends badly."""
    command = [sys.executable, __file__, "--child", json.dumps(task | {"tool": tool, "do": phase})]
    environment = os.environ | {"NBLLM_HOME": str(Path(task["file"]).parent / "home")}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        return {"error": child.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def run_child(task: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none
    kinds: dict[str, Any] = {"nbllm": Nbllm, "openaivec": Openaivec, "lotus": Lotus}
    tool = kinds[task["tool"]](task)
    found = PHASES[task["do"]](tool, task)
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # no tool's threads are waited for


def answers_equal(tool: str, task: dict[str, Any], theirs: list[Any], ours: list[Any]) -> int:
    """Rows whose texts nbllm gives, too, for the messages that the tool sent."""
    if tool == "lotus":
        return sum(a == b for a, b in zip(theirs, ours, strict=True))
    by_question: dict[str, Any] = {}
    for request, text in zip(json.loads(Path(task["file"]).read_text()), ours, strict=True):
        bodies = [message["body"] for message in json.loads(text)["assistant_messages"]]
        by_question |= dict(zip(request["rows"], bodies, strict=True))
    asked = questions(task["rows"])
    return sum(by_question[q] == text for q, text in zip(asked, theirs, strict=True))


def measure(tool: str, task: dict[str, Any]) -> dict[str, Any]:
    """All measurements of a tool."""
    found: dict[str, Any] = {"version": importlib.metadata.version(PACKAGES[tool])}
    for phase in ("speed", "failures", "interrupt"):
        busy = time.process_time()
        found[phase] = in_child(tool, phase, task)
        if "cpu_s" in found[phase]:
            found[phase]["cpu_s"] += time.process_time() - busy  # the server's
    if tool != "nbllm" and "error" not in found["speed"]:
        ours = in_child("nbllm", "replay", task)
        if "error" not in ours:
            theirs = found["speed"]["texts"]
            found["rows_equal"] = answers_equal(tool, task, theirs, ours.pop("texts"))
        found["nbllm_same_messages"] = ours
    found["speed"].pop("texts", None)
    return found


def stretched_model(folder: Path) -> Path:
    """The bundled model, with a longer context."""
    import nbllm

    model = folder / "demo"
    shutil.copytree(Path(nbllm.__file__).parent / "demo", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return model


def measure_all(tools: list[str], task: dict[str, Any]) -> dict[str, Any]:
    from nbllm import LLM

    found = {tool: measure(tool, task) for tool in tools if tool == "nbllm"}
    others = [tool for tool in tools if tool != "nbllm"]
    if others:
        with LLM(task["model"], dtype="float32") as llm, llm.serve() as server:
            task |= {"base_url": server.base_url, "api_key": server.api_key}
            task |= {"model_name": server.model_name}
            for tool in others:
                found[tool] = measure(tool, task)
    return found


def table(found: dict[str, Any], rows: int) -> pd.DataFrame:
    """A column for each tool."""
    columns = {}
    for tool, of in found.items():
        cut, same = of["interrupt"], of.get("nbllm_same_messages", {})
        cells = {"version": of["version"], "rows/s": of["speed"].get("rows_per_s", "failed")}
        cells["rows/s of nbllm, same messages"] = same.get("rows_per_s", "")
        for name, run in (("", of["speed"]), (" of nbllm, same messages", same)):
            cells[f"CPU ms a row{name}"] = (
                round(1_000 * run["cpu_s"] / rows) if "cpu_s" in run else ""
            )
        cells["rows with equal texts"] = of.get("rows_equal", "")
        for kind in BAD_ROWS:
            case = of["failures"].get(kind, {"answered": "failed", "error": None})
            cells[f"good rows of {GOOD_ROWS}, one {kind}"] = (
                f"{case['answered']} {case['error'] or ''}".strip()
            )
        for mode, what in (("plain", "kept at Ctrl-C"), ("cache", "kept, with its cache")):
            case = cut.get(mode)
            cells[f"rows {what}"] = f"{case['kept']} of {case['ended']}" if case else "failed"
        columns[tool] = cells
    return pd.DataFrame(columns)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000, help="of the speed; 9,000 at most")
    parser.add_argument("--interrupt-rows", type=int, default=300)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--batch-size", type=int, default=1, help="openaivec's rows a request")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(json.loads(options.child))
    with tempfile.TemporaryDirectory() as folder:
        task = {"model": str(stretched_model(Path(folder))), "file": f"{folder}/requests.json"}
        task |= {"rows": options.rows, "interrupt_rows": options.interrupt_rows}
        found = measure_all(options.tools, task | {"batch_size": options.batch_size})
    print(table(found, options.rows).to_string())
    print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg(), "tools": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
