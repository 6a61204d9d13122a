"""The widgets where JupyterLab is not around them; each skipped where that is not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Lab, jupyter_lab

Write = Callable[..., str]

pytestmark = pytest.mark.browser

SETUP = """\
from nbllm import LLM, Dashboard, Playground, SamplingControls, SamplingParams

llm = LLM(device="cpu", dtype="float32")"""
CONTROLS = """\
controls = SamplingControls(llm=llm, prompt="The capital of France is")
controls"""
PLAYGROUND = """\
params = SamplingParams(temperature=0, max_tokens=40, seed=1, ignore_eos=True)
playground = Playground(llm, "Once upon a time", params=params, live=True)
playground.run().wait(60)
playground"""
DASHBOARD = """\
dashboard = Dashboard(llm)
dashboard"""
CELLS = (SETUP, CONTROLS, PLAYGROUND, DASHBOARD)


def see_the_widgets(page: Any) -> None:
    """All are there, and a moved slider makes another text."""
    page.locator(".nbllm-curve-head", has_text="tokens can be drawn").wait_for()
    page.locator(".nbllm-dashboard").get_by_text("No requests").wait_for()
    tokens = page.locator(".nbllm-tokens")
    tokens.get_by_text("wolf").wait_for()
    slider = page.locator(".nbllm-sliders input[name=temperature]")
    slider.focus()
    slider.press("End")
    tokens.get_by_text("wolf").wait_for(state="detached")
    page.get_by_text("tokens/s · length").wait_for()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 2000})
    page.set_default_timeout(60_000)
    yield page
    page.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Notebook 7's."""
    pytest.importorskip("notebook")
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "notebooks").mkdir()
    with jupyter_lab(folder, "JupyterLab Dark", "notebook") as url:
        yield url, folder / "notebooks"


@pytest.fixture
def marimo(tmp_path: Path) -> Iterator[str]:
    """The URL of an app of the cells."""
    pytest.importorskip("marimo")
    results = "LLM, Dashboard, Playground, SamplingControls, SamplingParams, llm", "", "", ""
    app = "import marimo\n\napp = marimo.App()\n"
    for cell, result in zip(CELLS, results, strict=True):
        arguments = "" if result else results[0]
        app += f"\n@app.cell\ndef _({arguments}):\n{indent(cell, '    ')}\n    return {result}\n"
    (tmp_path / "app.py").write_text(app)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "run", str(tmp_path / "app.py"), "--headless"]
    command += ["--no-token", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"HOME": str(tmp_path)}  # where its settings are
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not is_healthy(f"{url}/health"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_the_widgets_in_notebook_7(page: Any, server: tuple[str, Path], write: Write) -> None:
    lab = Lab(page, server[0], "notebooks")
    lab.open(write("widgets.ipynb", *CELLS))
    lab.run_all()
    assert lab.errors() == []
    see_the_widgets(page)
    lab.screenshot("notebook-7")


def test_the_widgets_in_marimo(page: Any, marimo: str) -> None:
    page.goto(marimo)
    see_the_widgets(page)
