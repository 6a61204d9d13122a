"""Widgets in a real JupyterLab: what a person does to them, and what she sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nbformat
import pytest

pytestmark = pytest.mark.browser

Write = Callable[..., str]

SETUP = """\
from nbllm import LLM, Playground, SamplingParams

llm = LLM(device="cpu", dtype="float32")"""
PLAYGROUND = """\
playground = Playground(llm, "The capital of France is")
playground.run().wait(60)
playground"""


@pytest.fixture
def open_cells(lab: Any, write: Write) -> Callable[..., None]:
    """Runs cells in a new notebook, after that which makes `llm`."""

    def open_cells(*cells: str) -> None:
        lab.open(write("widgets.ipynb", SETUP, *cells))
        lab.run_all()
        assert lab.errors() == []

    return open_cells


def test_a_moved_slider_makes_another_text(lab: Any, open_cells: Callable[..., None]) -> None:
    open_cells(
        "params = SamplingParams(temperature=0, max_tokens=40, seed=1, ignore_eos=True)\n"
        'playground = Playground(llm, "Once upon a time", params=params, live=True)\n'
        "playground.run().wait(60)\nplayground"
    )
    tokens = lab.page.locator(".nbllm-tokens")
    before = tokens.inner_text()
    slider = lab.page.locator(".nbllm-sliders input[name=temperature]")
    slider.focus()
    slider.press("End")
    lab.page.wait_for_function(
        "(before) => { const tokens = document.querySelector('.nbllm-tokens');"
        " return tokens.innerText !== before && !tokens.classList.contains('nbllm-stale'); }",
        arg=before,
    )
    assert tokens.inner_text() != before


def test_a_token_shows_what_else_could_have_come_and_a_click_goes_on_from_there(
    lab: Any, open_cells: Callable[..., None], theme: str
) -> None:
    open_cells(PLAYGROUND)
    token = lab.page.locator(".nbllm-token").first
    token.hover()
    alternatives = lab.page.locator(".nbllm-alternatives")
    alternatives.wait_for(state="visible")
    assert alternatives.locator("button").count() > 1
    lab.screenshot(f"playground-{theme.split()[-1].lower()}")
    second = alternatives.locator("button").nth(1)
    word = second.locator(".nbllm-piece").inner_text()
    second.click()
    lab.page.wait_for_function(
        "(word) => document.querySelector('.nbllm-token').innerText === word", arg=word
    )
    lab.page.locator(".nbllm-branches").wait_for(state="visible")


def test_stop_works_while_a_cell_runs(lab: Any, write: Write) -> None:
    playground = (
        "import threading\n"
        "params = SamplingParams(temperature=1, max_tokens=900, ignore_eos=True)\n"
        'playground = Playground(llm, "Once upon a time", params=params)\n'
        "ended = threading.Event()\n"
        "playground.observe(lambda change: change['new']['running'] or ended.set(), 'state')\n"
        "playground"
    )
    lab.open(write("stop.ipynb", SETUP, playground, "print('stopped', ended.wait(50))"))
    lab.go_to_last_cell()
    lab.command("notebook:run-all-above")
    lab.page.get_by_role("button", name="Run", exact=True).click()
    lab.page.locator(".nbllm-token").nth(5).wait_for()
    lab.go_to_last_cell()  # the click was into another
    lab.start("notebook:run-cell")
    lab.page.get_by_text("[*]:").first.wait_for()
    lab.page.get_by_role("button", name="Stop", exact=True).click()
    lab.output("stopped True").wait_for()
    assert lab.page.locator(".nbllm-stats", has_text="stopped").count() == 1


def test_an_interrupt_ends_the_call_of_a_cell_and_keeps_the_engine(lab: Any, write: Write) -> None:
    long = "params = SamplingParams(max_tokens=900, ignore_eos=True)\n"
    long += "outputs = llm.generate(['Once'] * 64, params)"
    after = "print(llm.get_metrics()['num_requests_running'], 'left')"
    lab.open(write("interrupt.ipynb", SETUP, long, after))
    lab.start("notebook:run-all-cells")
    lab.output("Generating").wait_for()
    lab.command("notebook:interrupt-kernel")
    lab.output("Interrupted").wait_for()
    lab.wait_for_idle()
    lab.go_to_last_cell()
    lab.command("notebook:run-cell")
    lab.output("0 left").wait_for()


def test_what_is_frozen_is_still_there_after_the_page_is_loaded_again(
    lab: Any, open_cells: Callable[..., None], server: Any
) -> None:
    open_cells(PLAYGROUND, "playground.freeze()")
    picture = lab.page.locator(".jp-OutputArea-output img, .jp-OutputArea-output svg")
    picture.first.wait_for()
    lab.save()
    saved = nbformat.read(server[1] / "widgets.ipynb", as_version=4)
    data = saved.cells[1].outputs[-1].data
    assert "image/svg+xml" in data and "application/vnd.jupyter.widget-view+json" not in data
    lab.open("widgets.ipynb")
    picture.first.wait_for()
    lab.screenshot("frozen")
    assert lab.page.get_by_text("Error displaying widget").count() == 0
