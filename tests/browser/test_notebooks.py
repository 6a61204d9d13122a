"""The tutorials in a real JupyterLab."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(
    scope="module",
    params=["JupyterLab Light", pytest.param("JupyterLab Dark", marks=pytest.mark.slow)],
)
def theme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom(lab: Any, server: tuple[str, Path], path: Path) -> None:
    shutil.copy(path, server[1])
    lab.open(path.name)
    lab.run_all()
    assert lab.errors() == []
    lab.screenshot(path.stem)
