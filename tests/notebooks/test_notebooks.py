"""The tutorials run from top to bottom, twice, in a real kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def shown(notebook: Any) -> list[str]:
    """What each code cell shows, as text."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs = [
                o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs
            ]
            texts.append("\n".join(outputs))
    return texts


def without_progress(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "Generating" not in line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom_twice_with_the_same_texts(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    first = [without_progress(text) for text in shown(notebook)]
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert [without_progress(text) for text in shown(notebook)] == first


def test_the_quickstart_shows_answers_that_are_right() -> None:
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for texts in (shown(notebook), shown(nbformat.read(NOTEBOOKS[0], as_version=4))):
        for word in ("Paris", "42", "Tokyo", "Lima", "positive", "SamplingControls", "Rome"):
            assert word in "\n".join(texts)


def test_no_saved_notebook_holds_a_path_a_key_or_an_error() -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        assert "widgets" not in notebook.metadata
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                assert "Bearer" not in str(output) and "/home/" not in str(output)
