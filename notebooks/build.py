"""Makes the tutorials: `src/*.py` (py:percent) -> executed, frozen notebooks beside this file.

    python notebooks/build.py               # all of them
    python notebooks/build.py 03_dataframes

A notebook is frozen: what widgets showed is left as SVG and text, so that it looks the same on
GitHub, where nothing runs. Cells with the tag "varies" show times or the like, which differ from
run to run.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SOURCES = sorted((FOLDER / "src").glob("*.py"))
TIMEOUT_S = 120

_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def read_source(path: Path) -> Any:
    """The notebook of a source, without outputs; ids of cells depend on their places only."""
    source = jupytext.read(path, fmt="py:percent")
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": _KERNEL})
    for number, cell in enumerate(source.cells):
        tags = cell.metadata.get("tags")
        make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
        kept = {"tags": tags} if tags else {}
        notebook.cells.append(
            make[cell.cell_type](cell.source, id=f"cell-{number:02}", metadata=kept)
        )
    return notebook


def execute(notebook: Any) -> None:
    """Run all cells in a kernel of their own; raises CellExecutionError for one that fails."""
    resources = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=TIMEOUT_S, resources=resources, coalesce_streams=True)
    client.execute()


def freeze(notebook: Any) -> None:
    """Leave only what shows without a kernel and without scripts."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(_WIDGET_VIEW, None)


def add_colab_badge(notebook: Any, name: str, repository: str, version: str) -> None:
    """A link that opens this version of the notebook on Colab, under the title.

    Args:
        name: of the notebook, without its ending.
        repository: on GitHub, as "https://github.com/owner/name".
        version: whose tag is "v" + it.
    """
    path = repository.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/v{version}/notebooks/{name}.ipynb"
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = (
        f"{title}\n\n[![Open in Colab]({_BADGE})]({link}) "
        f"(there, run `%pip install -q git+{repository}@v{version}` first)\n{rest}"
    )


def build(source: Path) -> Path:
    """Execute one source and write its notebook."""
    notebook = read_source(source)
    execute(notebook)
    freeze(notebook)
    repository = _project_urls().get("Repository")
    if repository is not None:
        add_colab_badge(notebook, source.stem, repository, metadata.version("nbllm"))
    target = FOLDER / f"{source.stem}.ipynb"
    nbformat.write(notebook, target)
    return target


def _project_urls() -> dict[str, str]:
    """What pyproject.toml has in `[project.urls]`, as it was installed."""
    lines = metadata.metadata("nbllm").get_all("Project-URL", [])
    return dict(line.split(", ", 1) for line in lines)


def main(names: list[str]) -> None:
    """Build the notebooks of these names, or all."""
    unknown = set(names) - {source.stem for source in SOURCES}
    if unknown:
        sys.exit(f"no such notebook: {', '.join(sorted(unknown))}")
    for source in SOURCES:
        if not names or source.stem in names:
            print(build(source).name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
