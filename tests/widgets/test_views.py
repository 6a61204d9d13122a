"""The views in a browser without Jupyter, and what all of them keep to."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbllm import Dashboard, Playground, SamplingControls, SamplingParams
from nbllm.widgets.frozen import Frozen
from nbllm.widgets.view_source import slim, view_source, view_style

FOLDER = Path(__file__).parents[2] / "nbllm" / "widgets"
SCRIPTS = sorted(FOLDER.glob("*.js"))
STYLES = sorted(FOLDER.glob("*.css"))

RunView = Callable[..., Any]


def test_a_view_shows_its_controls_and_sends_what_is_turned(run_view: RunView) -> None:
    controls = SamplingControls(SamplingParams(temperature=0.7, seed=3, stop=["a"], max_tokens=9))
    turned = run_view(
        controls,
        """
        const box = (name) => el.querySelector(`[aria-label="${name}"]`);
        const shown = ["temperature", "seed", "stop", "max_tokens"].map((n) => box(n).value);
        const slider = box("temperature, slider");
        for (const value of [0.8, 0.9]) { slider.value = value; fire(slider, "input"); }
        const beside = box("temperature").value;
        fire(slider, "change");
        type(box("seed"), "12345678901234567890");
        type(box("stop"), "END\\n\\n");
        type(box("max_tokens"), "");
        box("ignore_eos").checked = true; fire(box("ignore_eos"), "input");
        return { shown, beside, saved };
        """,
    )
    assert turned["shown"] == ["0.7", "3", "a", "9"]
    assert turned["beside"] == "0.9"
    for state in turned["saved"]:  # as the kernel gets them
        controls.set_state({name: state[name] for name in ("values", "gesture")})
    assert controls.params == SamplingParams(
        temperature=0.9, seed=12345678901234567890, stop=["END"], ignore_eos=True
    )
    for _ in range(4):
        controls.undo()
    assert controls.params.temperature == 0.9
    controls.undo()
    assert controls.params.temperature == 0.7  # the way of the slider was one step
    assert not controls.can_undo


def test_a_view_shows_what_is_wrong_or_idle_where_it_is(run_view: RunView) -> None:
    controls = SamplingControls()
    controls.values = {"temperature": 0, "n": 2}
    greedy = run_view(
        controls,
        """
        const field = (name) => el.querySelector(`[aria-label="${name}"]`).parentElement;
        const hint = (name) => field(name).querySelector(".nbllm-controls-hint").textContent;
        const before = {
          note: el.querySelector(".nbllm-controls > .nbllm-muted").textContent,
          n: hint("n"), temperature: hint("temperature"),
          off: el.querySelector('[aria-label="top_p"]').disabled,
          invalid: el.querySelector('[aria-label="n"]').getAttribute("aria-invalid"),
          role: field("n").querySelector(".nbllm-controls-hint").getAttribute("role"),
          copy: el.querySelector('[aria-label="Copy the code"]').disabled,
        };
        change({ errors: {}, idle: {}, code_text: "SamplingParams(n=2)" });
        return { before, n: hint("n"),
          note: el.querySelector(".nbllm-controls > .nbllm-muted").textContent,
          code: el.querySelector("code").textContent,
          off: el.querySelector('[aria-label="top_p"]').disabled };
        """,
    )
    before = greedy["before"]
    assert "top_p, top_k, min_p, seed: no effect at temperature 0" in before["note"]
    assert before["off"]
    assert "n must be 1" in before["n"] and before["temperature"] == ""
    assert before["invalid"] == "true" and before["role"] == "alert" and before["copy"]
    assert greedy["n"] == greedy["note"] == "" and not greedy["off"]
    assert greedy["code"] == "SamplingParams(n=2)"


def test_everything_goes_by_keyboard_and_is_taken_away_at_the_end(run_view: RunView) -> None:
    controls = SamplingControls()
    controls.apply_preset("balanced")
    keys = run_view(
        controls,
        """
        const named = (name) => el.querySelector(`[aria-label="${name}"]`);
        const slider = named("temperature, slider");
        fire(slider, "keydown", { key: "z", ctrlKey: true });
        fire(slider, "keydown", { key: "Z", metaKey: true, shiftKey: true });
        fire(named("seed"), "keydown", { key: "z", ctrlKey: true }); // the field's own undo
        named("Undo (Ctrl+Z)").click();
        const button = named("creative");
        change({ values: { ...state.values, seed: 1 } }); // while the mouse is down, say
        const isSame = named("creative") === button;
        button.click();
        const pressed = [...el.querySelectorAll("[aria-pressed=true]")].map((b) => b.textContent);
        named("prompt of the curve").value = "Hello";
        fire(named("prompt of the curve"), "keydown", { key: "Enter" });
        fire(named("prompt of the curve"), "change"); // asks once
        const nameless = [...el.querySelectorAll("input, textarea, button")].filter(
          (one) => !one.getAttribute("aria-label"));
        const ids = el.querySelectorAll("[id]").length;
        const redo = named("Redo (Ctrl+Shift+Z)").disabled;
        const wasHidden = named("prompt of the curve").closest("[hidden]") !== null;
        change({ can_preview: true, curve: "<svg><title>odds</title></svg>", prompt: "Hello" });
        const curve = el.querySelector("svg title").textContent;
        cleanup();
        change({ values: { ...state.values, top_p: 0.1 } });
        return { sent, pressed, isSame, nameless: nameless.length, ids, redo, curve, wasHidden,
          left: el.children.length, listeners: Object.values(listeners).flat().length };
        """,
    )
    assert keys["sent"] == [
        {"type": "undo"},
        {"type": "redo"},
        {"type": "undo"},
        {"type": "preset", "name": "creative"},
        {"type": "preview", "prompt": "Hello"},
    ]
    assert keys["isSame"]
    assert keys["pressed"] == ["balanced"] and keys["redo"]
    assert keys["nameless"] == keys["ids"] == 0
    assert keys["wasHidden"] and keys["curve"] == "odds"
    assert keys["left"] == keys["listeners"] == 0


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_a_script_is_plain_and_asks_the_network_for_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    without_comments = re.sub(r"^\s*//.*$|/\*[\s\S]*?\*/", "", text, flags=re.MULTILINE)
    code = without_comments.replace("http://www.w3.org/2000/svg", "")  # a name, no address
    assert not re.search(r"\bimport\b|\bfetch\(|https?:|getElementById|\beval\(", code)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_every_script_can_be_read_by_the_browser() -> None:
    for path in SCRIPTS:
        command = ["node", "--input-type=module", "--check"]
        done = subprocess.run(
            command, input=path.read_text(encoding="utf-8"), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_styles_touch_nothing_but_their_own_classes() -> None:
    for path in STYLES:
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for selector in re.findall(r"([^{};]+)\{", text):
            for part in selector.split(","):
                part = part.strip()
                is_own = part.startswith((".nbllm-", ":root", ":host", "@media", "@keyframes"))
                assert is_own or re.fullmatch(r"from|to|\d+%", part), f"{path.name}: {part}"


def test_parts_of_a_view_are_one_module_in_order() -> None:
    source = view_source("sampling_controls", "sampling_controls_view")
    assert source.count("export default") == 1
    assert source.index("function renderSamplingControls") < source.index("export default")
    style = view_style("sampling_controls")
    assert style.index("--nbllm-fg:") < style.index(".nbllm-controls")


@pytest.mark.parametrize("widget", [Dashboard, Playground, SamplingControls])
def test_what_a_notebook_saves_of_a_view_is_small(widget: type[Frozen]) -> None:
    for text, limit in ((widget._esm, 15 * 1024), (widget._css, 8 * 1024)):
        assert len(text) <= limit
        assert "/*" not in text and "\n " not in text and "\n\n" not in text
        assert not re.search(r"^//|\s// ", text, re.MULTILINE)
    assert slim('a = "b" // c\n\n  /* d\n e */ f;\n// g\n') == 'a = "b"\nf;'
