"""Views without Jupyter: a page in headless chromium, with a model that has anywidget's methods."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# What anywidget gives a view, and a wait for a condition. `change` is the kernel's side.
PAGE = """<!doctype html><meta charset="utf-8"><style>%(style)s</style><body></body>
<script type="module">
const state = %(state)s, sent = [], saved = [], listeners = {};
const model = {
  get: (name) => state[name],
  set(name, value) { state[name] = value; this.emit(`change:${name}`); },
  save_changes() { saved.push(structuredClone(state)); },
  send(content) { sent.push(content); },
  on(name, f) { (listeners[name] ??= []).push(f); },
  off(name, f) { listeners[name] = (listeners[name] ?? []).filter((g) => f && g !== f); },
  emit(name, ...rest) { for (const f of [...(listeners[name] ?? [])]) f(...rest); },
};
const change = (values) => {
  Object.assign(state, values);
  for (const name of Object.keys(values)) model.emit(`change:${name}`);
};
const message = (content) => model.emit("msg:custom", content, []);
const waitFor = async (f) => {
  for (let i = 0; i < 400; i += 1) {
    const value = await f();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  throw new Error(`it never became true: ${f}`);
};
const fire = (element, type, options = {}) =>
  element.dispatchEvent(
    new (type.startsWith("key") ? KeyboardEvent : type.startsWith("p") ? PointerEvent : Event)(
      type, { bubbles: true, composed: true, cancelable: true, ...options }));
const type = (element, value) => {
  element.value = value; fire(element, "input"); fire(element, "change");
};
const el = document.createElement("div");
document.body.append(el);
let answer;
try {
  const url = URL.createObjectURL(new Blob([%(source)s], { type: "text/javascript" }));
  const view = (await import(url)).default;
  const cleanup = await view.render({ model, el });
  answer = { value: await (async () => { %(script)s })() ?? null };
} catch (error) {
  answer = { error: `${error.stack ?? error}` };
}
const output = document.createElement("template");
output.id = "answer";
output.setAttribute("data-answer", encodeURIComponent(JSON.stringify(answer)));
document.body.append(output);
</script>"""

RunView = Callable[..., Any]


@pytest.fixture
def run_view(tmp_path: Path) -> RunView:
    """(widget, JavaScript, traits to change) -> what the JavaScript returns.

    The script runs after `render` of the widget's state, with `el`, `model`, `sent` (messages),
    `saved` (states that were sent), `change(traits)` and `message(content)` (from the kernel),
    `fire(element, type, options)`, `type(element, value)`, `waitFor(condition)` and `cleanup`.
    """
    if CHROMIUM is None:
        pytest.skip("there is no chromium")

    def run(widget: Any, script: str, **traits: Any) -> Any:
        state = {**widget.get_state(), **traits}
        source, style = state.pop("_esm"), state.pop("_css", "")
        parts = {
            "style": style,
            "state": json.dumps(state),
            "source": json.dumps(source),
            "script": script,
        }
        page = tmp_path / "page.html"
        page.write_text(PAGE % {k: v.replace("</", r"<\/") for k, v in parts.items()}, "utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True
        )
        encoded = done.stdout.split('data-answer="')[1].split('"')[0]
        answer = json.loads(unquote(encoded))
        assert "error" not in answer, answer["error"]
        return answer["value"]

    return run
