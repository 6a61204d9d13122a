"""A real JupyterLab, and a real browser that looks at it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = "for-the-tests"
TIMEOUT_MS = 120_000
NO_NEWS = {"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True}


class Lab:
    """A notebook that is open in JupyterLab, or in what is built of its parts.

    Args:
        page: of the browser.
        url: of the server.
        path: where it shows notebooks.
    """

    def __init__(self, page: Any, url: str, path: str = "lab/tree") -> None:
        self.page = page
        self._url = f"{url}{path}/"

    def open(self, name: str) -> None:
        """Show a notebook of the server's folder, and wait for its kernel."""
        self.page.goto(f"{self._url}{quote(name)}?token={TOKEN}&reset")
        self.page.wait_for_function(
            "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status"
            " === 'idle'",
            timeout=TIMEOUT_MS,
        )

    def command(self, name: str) -> None:
        """Run a command of JupyterLab and wait for its end."""
        self.page.evaluate("(name) => window.jupyterapp.commands.execute(name)", name)

    def start(self, name: str) -> None:
        """Start a command of JupyterLab."""
        self.page.evaluate("(name) => void window.jupyterapp.commands.execute(name)", name)

    def run_all(self) -> None:
        """Run all cells, to the end of the last."""
        self.command("notebook:run-all-cells")

    def wait_for_idle(self) -> None:
        """Wait until no cell runs or is queued.

        A kernel that shows an error still refuses, for a moment, whatever it is asked to run.
        """
        self.page.wait_for_function(
            "() => ![...document.querySelectorAll('.jp-InputPrompt')]"
            ".some((prompt) => prompt.innerText.includes('[*]'))"
        )

    def go_to_last_cell(self) -> None:
        """Make the last cell the current one."""
        self.page.evaluate(
            "() => { const { content } = window.jupyterapp.shell.currentWidget;"
            " content.activeCellIndex = content.widgets.length - 1; }"
        )

    def save(self) -> None:
        """Write the notebook to the disk."""
        self.command("docmanager:save")

    def output(self, text: str) -> Any:
        """The cell whose outputs hold a text."""
        return self.page.locator(".jp-Cell-outputArea", has_text=text)

    def errors(self) -> list[str]:
        """What cells have raised."""
        selector = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def screenshot(self, name: str) -> None:
        """Keep a picture, where `NBLLM_SCREENSHOTS` says, to be looked at."""
        folder = os.environ.get("NBLLM_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, which containers are, chromium has no sandbox to offer.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def jupyter_lab(folder: Path, theme: str, application: str = "jupyterlab") -> Iterator[str]:
    """The URL of a server for the notebooks of `folder / "notebooks"`.

    Args:
        folder: has all its files.
        theme: of the pages.
        application: the module that is run.
    """
    from jupyter_server.serverapp import list_running_servers

    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(NO_NEWS))
    runtime = folder / "runtime"
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    command = [sys.executable, "-m", application, "--no-browser", "--allow-root"]
    command += ["--ServerApp.port=0", f"--ServerApp.root_dir={folder / 'notebooks'}"]
    command += [f"--IdentityProvider.token={TOKEN}"]
    for page in ("LabApp", "JupyterNotebookApp"):
        command += [f"--{page}.expose_app_in_browser=True"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (servers := list(list_running_servers(str(runtime)))):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield servers[0]["url"]
    finally:
        process.terminate()
        process.wait(timeout=30)


Write = Callable[..., str]


@pytest.fixture(
    scope="module",
    params=["JupyterLab Dark", pytest.param("JupyterLab Light", marks=pytest.mark.slow)],
)
def theme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(theme: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    with jupyter_lab(folder, theme) as url:
        yield url, folder / "notebooks"


@pytest.fixture
def lab(browser: Any, server: tuple[str, Path]) -> Iterator[Lab]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT_MS)
    yield Lab(page, server[0])
    page.close()


@pytest.fixture
def write(server: tuple[str, Path]) -> Write:
    """Makes a notebook of some cells in the server's folder and returns its name."""

    def write(name: str, *cells: str) -> str:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(notebook, server[1] / name)
        return name

    return write
