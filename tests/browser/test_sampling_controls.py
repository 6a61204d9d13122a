"""SamplingControls in a real JupyterLab: keys, mouse, and the way to the kernel and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.browser

CELL = """
from nbllm import LLM, SamplingControls, SamplingParams
llm = LLM(device="cpu")
controls = SamplingControls(SamplingParams(temperature=0.7, max_tokens=40), llm, "The future of")
controls"""


def test_the_controls_are_turned_by_keys_and_mouse_and_taken_back(
    lab: Any, write: Callable[..., str], theme: str
) -> None:
    def wait_for(condition: str) -> None:
        lab.page.wait_for_function(condition)

    def wait_for_value(label: str, value: str) -> None:
        wait_for(f"""document.querySelector('[aria-label="{label}"]').value === '{value}'""")

    lab.open(write("controls.ipynb", CELL))
    lab.run_all()
    assert lab.errors() == []
    slider = lab.page.get_by_label("temperature, slider")
    for _ in range(4):
        slider.press("ArrowRight")  # which JupyterLab would like to have, too
    lab.page.get_by_label("seed").fill("77")
    lab.page.get_by_role("button", name="creative").click()  # ends the typing, too
    wait_for_value("temperature", "1.1")
    lab.page.get_by_text("As code").click()
    wait_for("document.querySelector('.nbllm-controls-code').textContent.includes('seed=77')")
    slider.press("Control+z")
    wait_for_value("temperature", "0.9")
    slider.press("Control+z")
    wait_for_value("seed", "")
    prompt = lab.page.get_by_label("prompt of the curve")
    prompt.fill("What is")
    prompt.press("Enter")
    wait_for("document.querySelector('.nbllm-controls svg title').textContent.includes('What·is')")
    lab.screenshot(f"sampling_controls-{theme.split()[-1].lower()}")
