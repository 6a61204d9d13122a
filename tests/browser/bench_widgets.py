"""How long from a slider to a new text on the screen, and what open views cost the engine.

    python tests/browser/bench_widgets.py

In a real JupyterLab, with the bundled model. The first figure runs from the slider's DOM event to
the frame after that in which the first token of the new text stands; `engine` of it is the wait for
that token as Python sees it, and the rest is the widget's, JupyterLab's and the browser's. The
second is the speed of a text with three open views over that of the same text with none, by turns.
The browser runs on the same cores as the engine.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from conftest import CHROMIUM, Lab, jupyter_lab
from playwright.sync_api import sync_playwright

NUM_MOVES = 40
NUM_TURNS = 8
SETUP = """\
from nbllm import LLM, Playground, SamplingParams
llm = LLM(device="cpu", dtype="float32")
params = SamplingParams(temperature=0.5, max_tokens=24, seed=1, ignore_eos=True)
playground = Playground(llm, "Once upon a time", params=params, live=True)
playground.run().wait(60)
playground"""
VIEWS = """\
long = params.clone(max_tokens=400)
shown = Playground(llm, "Once upon a time", params=long)
unseen = Playground(llm, "Once upon a time", params=long)
shown"""
TURNS = f"""\
import json, time
rates = {{"shown": [], "unseen": []}}
for turn in range({NUM_TURNS} + 1):
    for name, one in (("unseen", unseen), ("shown", shown)):
        start = time.perf_counter()
        one.run().wait(120)
        if turn:  # not the first, which warms up
            rates[name].append(400 / (time.perf_counter() - start))
    assert shown.text == unseen.text
print(json.dumps(rates))"""
# Resolves once a frame with the first token of the new text was drawn.
MOVE = """(value) => new Promise((resolve) => {
  const slider = document.querySelector(".nbllm-sliders input[name=temperature]");
  const tokens = document.querySelector(".nbllm-tokens");
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


def measure_slider(lab: Lab) -> dict[str, Any]:
    """Milliseconds from a slider's event to a painted token."""
    whole, engine = [], []
    for move in range(NUM_MOVES):
        lab.page.wait_for_function(IDLE)
        lab.page.wait_for_timeout(100)
        whole.append(lab.page.evaluate(MOVE, f"{0.3 + 0.05 * (move % 20):.2f}"))
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
        "rest_ms": {"p50": statistics.median(rest)},
    }


def measure_views(lab: Lab) -> dict[str, Any]:
    """Tokens/s of a text that three views show, and of one that none does."""
    printed = lab.page.locator(".jp-OutputArea-output", has_text='{"shown"').last.inner_text()
    rates = json.loads(printed)
    return {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "shown_over_unseen": statistics.median(
            a / b for a, b in zip(rates["shown"], rates["unseen"], strict=True)
        ),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        notebooks = Path(folder) / "notebooks"
        notebooks.mkdir()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with jupyter_lab(Path(folder), "JupyterLab Light") as url:
            lab = Lab(browser.new_page(viewport={"width": 1280, "height": 900}), url)
            lab.open(write(notebooks, "slider.ipynb", SETUP))
            lab.run_all()
            result = measure_slider(lab)
            lab.open(write(notebooks, "views.ipynb", SETUP, VIEWS, "shown", "shown", TURNS))
            lab.run_all()
            result |= measure_views(lab)
        browser.close()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
