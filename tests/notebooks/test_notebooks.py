"""The tutorials run from top to bottom, twice, in a real kernel; they are as their sources say."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from nbllm.nbcheck import check_notebook

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """notebooks/build.py."""
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any) -> dict[str, str]:
    """What each code cell shows, as text: neither progress nor what differs from run to run."""
    texts = {}
    for cell in code_cells(notebook):
        outputs = [o for o in cell.outputs if "<progress" not in str(o.get("data"))]
        if "varies" not in cell.metadata.get("tags", []):
            texts[cell.id] = "\n".join(
                o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs
            )
    return texts


@cache
def run_twice(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What "Run All" shows, and what it shows again in the same kernel."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=120, resources=resources, coalesce_streams=True)
    runs = []
    with client.setup_kernel():
        for _ in range(2):
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            runs.append(shown(notebook))
    return runs[0], runs[1]


@each_notebook
def test_a_notebook_runs_from_top_to_bottom_twice_with_the_same_texts(path: Path) -> None:
    first, second = run_twice(path)
    assert second == first


def test_the_quickstart_shows_answers_that_are_right() -> None:
    first, _ = run_twice(NOTEBOOKS[0])
    for texts in (first, shown(nbformat.read(NOTEBOOKS[0], as_version=4))):
        for word in ("Paris", "42", "Tokyo", "Lima", "positive", "SamplingControls", "Rome"):
            assert word in "\n".join(texts.values())


def test_what_is_saved_was_built_from_the_sources(build: ModuleType) -> None:
    assert [path.stem for path in NOTEBOOKS] == [source.stem for source in build.SOURCES]
    for path, source in zip(NOTEBOOKS, build.SOURCES, strict=True):
        saved, made = nbformat.read(path, as_version=4), build.read_source(source)
        assert [cell.id for cell in saved.cells] == [cell.id for cell in made.cells], path.name
        for cell, expected in zip(code_cells(saved), code_cells(made), strict=True):
            assert cell.source == expected.source, f"{path.name}: run notebooks/build.py"
            assert cell.metadata.get("tags") == expected.metadata.get("tags")
            assert cell.execution_count is not None, f"{path.name} was not executed"
        titles = [n.cells[0].source.partition("\n")[0] for n in (saved, made)]
        assert titles[0] == titles[1]
        assert [c.source for c in saved.cells[1:]] == [c.source for c in made.cells[1:]]


@each_notebook
def test_a_saved_notebook_is_frozen_and_holds_no_path_no_key_and_no_error(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert check_notebook(path) == []
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 100_000
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            kinds = output.get("data", {"text/plain": ""})
            assert "text/plain" in kinds
            assert not any("widget-view" in kind for kind in kinds)
            assert not re.search(r"Bearer|/home/|/root/|/tmp/", str(output))


@each_notebook
def test_a_notebook_says_what_is_seen_checks_it_and_gives_the_memory_back(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    assert "You will see" in notebook.cells[0].source
    last = code_cells(notebook)[-1].source
    assert "llm.close()" in last or "engine.release()" in last
    if path != NOTEBOOKS[0]:  # which is read in five minutes; a test of its own looks at it
        assert sum("assert" in cell.source for cell in code_cells(notebook)) >= 4


@each_notebook
def test_the_files_that_a_notebook_links_to_exist(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)]+)\)", cell.source):
                assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_the_link_to_colab_opens_the_version_that_it_installs(build: ModuleType) -> None:
    notebook = build.read_source(build.SOURCES[0])
    title, _, text = notebook.cells[0].source.partition("\n")
    build.add_colab_badge(notebook, "01_quickstart", "https://github.com/owner/name", "1.2.3")
    source = notebook.cells[0].source
    assert source.startswith(f"{title}\n\n[![Open in Colab](https://colab")
    assert "/github/owner/name/blob/v1.2.3/notebooks/01_quickstart.ipynb)" in source
    assert "git+https://github.com/owner/name@v1.2.3" in source
    assert source.endswith(text)
