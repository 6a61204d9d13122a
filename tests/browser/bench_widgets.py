"""How long from a slider to a new text on the screen, and what open views cost the engine.

    python tests/browser/bench_widgets.py [--rest-ms 100]

In a real JupyterLab, with the bundled model; the browser runs on the same cores as the engine.

`slider_to_paint_ms` runs from the slider's DOM event, on a page at rest, to the end of the frame in
which the first token of the new text stands. `engine_ms` of it is the wait for that token as Python
sees it; the rest is the widget's, JupyterLab's and the browser's. `floor_ms` is the same way for a
widget that does nothing but answer, `own_ms` what the rest is longer than that: the playground's
own share. With a shorter `--rest-ms` between two moves, JupyterLab is still busy with the last one.

The others are of one text, by turns read by a cell with `LLM.stream` ("alone"), by a playground
without a view ("unseen"; its messages reach the browser, too) and by one with three views
("shown"). `shown_over_alone` and `shown_over_unseen` are ratios of tokens/s: what the views take
from an engine that shares its cores with their browser. `cpu_ms` is the CPU time of each process
for the text, which a busy machine changes less; `kernel_share` is what the kernel's is longer than
"alone": the cost where the browser runs on another machine, as it does with a remote kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from conftest import CHROMIUM, Lab, jupyter_lab
from playwright.sync_api import sync_playwright

NUM_MOVES = 40
AT_REST_MS = 300  # JupyterLab goes on for some 200 ms after it has shown an answer
NUM_TURNS = 8
SETUP = """\
from nbllm import LLM, Playground, SamplingParams
llm = LLM(device="cpu", dtype="float32")
params = SamplingParams(temperature=0.5, max_tokens=24, seed=1, ignore_eos=True)
playground = Playground(llm, "Once upon a time", params=params, live=True)
playground.run().wait(60)
playground"""
ECHO = """\
import anywidget, traitlets
class Echo(anywidget.AnyWidget):
    _esm = '''
        export default { render({ model, el }) {
          const input = document.createElement("input"), answers = document.createElement("div");
          input.type = "range"; input.name = "echo"; input.step = 0.01; input.max = 2;
          answers.className = "echo-answers";
          input.oninput = () => { model.set("value", input.value); model.save_changes(); };
          model.on("msg:custom", (text) => answers.append(document.createElement("p"), text));
          el.append(input, answers);
        } };'''
    value = traitlets.Unicode().tag(sync=True)
echo = Echo()
echo.observe(lambda change: echo.send(change["new"]), "value")
echo"""
VIEWS = """\
from nbllm.sampling_params import RequestOutputKind
long = params.clone(max_tokens=400)
streamed = long.clone(logprobs=5, output_kind=RequestOutputKind.DELTA)
shown = Playground(llm, "Once upon a time", params=long)
unseen = Playground(llm, "Once upon a time", params=long)
shown"""
TURNS = f"""\
import json, os, pathlib, time
def cpu_ms():
    parents, used, names = {{}}, {{}}, {{}}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue  # it has ended
        fields, pid = rest.split(), int(path.parent.name)
        parents[pid], names[pid] = int(fields[1]), name
        used[pid] = 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    total = {{"kernel": used[os.getpid()], "server": used[os.getppid()], "browser": 0.0}}
    for pid in used:
        above = pid
        while above not in (0, {os.getpid()}):
            above = parents.get(above, 0)
        if above and names[pid].startswith("chrom"):
            total["browser"] += used[pid]
    return total
ways = {{
    "alone": lambda: [None for _ in llm.stream("Once upon a time", streamed)],
    "unseen": lambda: unseen.run().wait(120),
    "shown": lambda: shown.run().wait(120),
}}
rates, cpu = {{name: [] for name in ways}}, {{name: [] for name in ways}}
for turn in range({NUM_TURNS} + 1):
    for name, way in ways.items():
        before, start = cpu_ms(), time.perf_counter()
        way()
        seconds = time.perf_counter() - start
        time.sleep(0.3)  # for the last frames
        after = cpu_ms()
        if turn:  # not the first, which warms up
            rates[name].append(400 / seconds)
            cpu[name].append({{process: after[process] - before[process] for process in after}})
    assert shown.text == unseen.text
print(json.dumps({{"rates": rates, "cpu": cpu}}))"""
# Resolves once a frame with the first token of the new text was drawn.
MOVE = """([value, input, output]) => new Promise((resolve) => {
  const slider = document.querySelector(input);
  const tokens = document.querySelector(output);
  let start;
  const observer = new MutationObserver((changes) => {
    const isNew = changes.some((change) => [...change.addedNodes].length > 0);
    if (!isNew || tokens.classList.contains("nbllm-stale")) return;
    observer.disconnect();
    requestAnimationFrame(() => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => resolve(performance.now() - start);
      port2.postMessage(null);  // handled after the frame was painted
    });
  });
  observer.observe(tokens, { childList: true, attributes: true });
  slider.value = value;
  start = performance.now();
  slider.dispatchEvent(new Event("input", { bubbles: true }));
})"""
PLAYGROUND = [".nbllm-sliders input[name=temperature]", ".nbllm-tokens"]
ANSWER = ["input[name=echo]", ".echo-answers"]
IDLE = (
    "() => [...document.querySelectorAll('button')].some(b => b.innerText === 'Stop' && b.disabled)"
)


def write(folder: Path, name: str, *cells: str) -> str:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, folder / name)
    return name


def measure_slider(lab: Lab, rest_ms: int) -> dict[str, Any]:
    """Milliseconds from a slider's event to a painted token."""
    whole, engine, floor = [], [], []
    for move in range(NUM_MOVES):
        value = f"{0.3 + 0.05 * (move % 20):.2f}"
        lab.page.wait_for_function(IDLE)
        lab.page.wait_for_timeout(rest_ms)
        floor.append(lab.page.evaluate(MOVE, [value, *ANSWER]))
        lab.page.wait_for_timeout(rest_ms)
        whole.append(lab.page.evaluate(MOVE, [value, *PLAYGROUND]))
        lab.page.wait_for_function(IDLE)
        stats = lab.page.locator(".nbllm-stats").first.inner_text()
        found = re.search(r"first token (\d+) ms", stats)
        assert found is not None, stats
        engine.append(float(found[1]))
    rest = [a - b for a, b in zip(whole, engine, strict=True)]
    return {
        "slider_to_paint_ms": {
            "p50": statistics.median(whole),
            "p90": statistics.quantiles(whole, n=10)[-1],
        },
        "engine_ms": {"p50": statistics.median(engine)},
        "floor_ms": {"p50": statistics.median(floor)},
        "own_ms": {"p50": statistics.median(rest) - statistics.median(floor)},
    }


def measure_views(lab: Lab) -> dict[str, Any]:
    """Tokens/s and CPU milliseconds of a text, by who reads it."""
    printed = lab.page.locator(".jp-OutputArea-output", has_text='{"rates"').last.inner_text()
    found = json.loads(printed)
    rates, cpu = found["rates"], found["cpu"]
    cpu_ms = {
        name: {process: statistics.median(t[process] for t in turns) for process in turns[0]}
        for name, turns in cpu.items()
    }

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(rates["shown"], rates[name], strict=True))

    return {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "shown_over_alone": ratio("alone"),
        "shown_over_unseen": ratio("unseen"),
        "cpu_ms": cpu_ms,
        "kernel_share": cpu_ms["shown"]["kernel"] / cpu_ms["alone"]["kernel"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest-ms", type=int, default=AT_REST_MS)
    rest_ms = parser.parse_args().rest_ms
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        notebooks = Path(folder) / "notebooks"
        notebooks.mkdir()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with jupyter_lab(Path(folder), "JupyterLab Light") as url:
            lab = Lab(browser.new_page(viewport={"width": 1280, "height": 900}), url)
            lab.open(write(notebooks, "slider.ipynb", SETUP, ECHO))
            lab.run_all()
            result = measure_slider(lab, rest_ms)
            lab.open(write(notebooks, "views.ipynb", SETUP, VIEWS, "shown", "shown", TURNS))
            lab.run_all()
            result |= measure_views(lab)
        browser.close()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
