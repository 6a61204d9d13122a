"""`nbllm nbcheck`: would a saved notebook show its results where nothing runs?

GitHub and nbviewer have no kernel and no widgets; GitHub also strips scripts and styles. What is
left of an output there is what this looks at.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from nbllm.errors import InvalidRequestError

MAX_OUTPUT_BYTES = 1_000_000
"""Of all outputs of a notebook; GitHub shows no larger ones reliably."""

_STATIC = ("text/html", "text/markdown", "text/latex", "image/")
_NO_TEXT = re.compile(r"\s*(Output\(\)|HBox\(.*|VBox\(.*|)\s*", re.DOTALL)  # of ipywidgets
_COLOUR = re.compile(r"background(-color)?\s*:\s*(?!none|inherit|transparent|initial)", re.I)
_HIDDEN = ("style", "script", "template", "noscript", "iframe", "head")
_PICTURES = ("img", "svg")


@dataclass(frozen=True, slots=True)
class Finding:
    """What would not be seen.

    Attributes:
        cell: number of the cell, from 1; None is the notebook.
        problem: what is wrong.
        remedy: what to do.
    """

    cell: int | None
    problem: str
    remedy: str

    def __str__(self) -> str:
        place = "notebook" if self.cell is None else f"cell {self.cell}"
        return f"{place}: {self.problem}; {self.remedy}"


def check_notebook(path: Path | str) -> list[Finding]:
    """What of a saved notebook would be blank, or missing, on GitHub or nbviewer.

    Raises:
        InvalidRequestError: it can't be read, or is no notebook of format 4.
    """
    notebook = _read(Path(path))
    findings = list(_check_metadata(notebook.get("metadata") or {}))
    size = 0
    for number, cell in enumerate(notebook["cells"], start=1):
        outputs = cell.get("outputs") or []
        size += len(json.dumps(outputs, ensure_ascii=False).encode()) if outputs else 0
        for output in outputs:
            found = _check_output(output)
            if found is not None:
                findings.append(Finding(number, *found))
    if size > MAX_OUTPUT_BYTES:
        problem = f"its outputs have {size / 1e6:.1f} MB, more than {MAX_OUTPUT_BYTES / 1e6:.0f} MB"
        findings.append(Finding(None, problem, "show less, or clear the largest"))
    return findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm nbcheck`."""
    parser.add_argument("file", nargs="+", help="notebooks (.ipynb)")


def run(arguments: argparse.Namespace) -> int:
    """Check notebooks and print a line for each finding.

    Returns:
        0 if there is nothing to find, 1 if there is, 2 if a file can't be read as a notebook.
    """
    status = 0
    for file in arguments.file:
        try:
            findings = check_notebook(file)
        except InvalidRequestError as error:
            sys.stderr.write(f"nbllm nbcheck: {error}\n")
            status = 2
            continue
        for finding in findings:
            sys.stdout.write(f"{file}: {finding}\n")
        if findings:
            status = max(status, 1)
        else:
            sys.stdout.write(f"{file}: ok\n")
    return status


def _read(path: Path) -> dict[str, Any]:
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"{path}: {error.strerror}", parameter="file") from error
    except ValueError as error:  # of JSON or UTF-8
        raise InvalidRequestError(f"{path} is no notebook: {error}", parameter="file") from error
    if not isinstance(notebook, dict) or "nbformat" not in notebook:
        raise InvalidRequestError(f"{path} is no notebook: it has no nbformat", parameter="file")
    version, cells = notebook["nbformat"], notebook.get("cells")
    if version != 4:
        problem = f"{path} has format {version}; open and save it in Jupyter to get format 4"
        raise InvalidRequestError(problem, parameter="file")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InvalidRequestError(f"{path} is no notebook: it has no cells", parameter="file")
    return notebook


def _check_metadata(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """GitHub shows nothing at all of a notebook whose widgets have no state."""
    widgets = metadata.get("widgets")
    if widgets is None:
        return
    states = widgets.values() if isinstance(widgets, dict) else [widgets]
    if not states or not all(isinstance(one, dict) and "state" in one for one in states):
        problem = "metadata.widgets has no state, and GitHub shows no notebook with that"
        yield Finding(None, problem, "delete metadata.widgets")


def _check_output(output: Mapping[str, Any]) -> tuple[str, str] | None:
    """(problem, remedy), or None."""
    if output.get("output_type") == "error":
        problem = f"it ends in {output.get('ename', 'an error')}"
        return problem, "mend the cell and run it again"
    data = output.get("data")
    if not isinstance(data, dict):
        return None
    live = [kind for kind in data if kind.startswith("application/vnd.") or "javascript" in kind]
    static = [kind for kind in data if kind.startswith(_STATIC)]
    if live and not static:
        problem = f"only a live form ({live[0]}), which needs a kernel or scripts"
        return problem, "freeze() the widget, or show a picture, too"
    if static == ["text/html"]:
        return _check_html(_text(data["text/html"]))
    if not static and _NO_TEXT.fullmatch(_text(data.get("text/plain", ""))):
        return "an empty output", "show the result itself, not a widget around it"
    return None


def _check_html(html: str) -> tuple[str, str] | None:
    visible = _Visible()
    visible.feed(html)
    visible.close()
    if not visible.has_content:
        problem = "HTML without content: GitHub strips scripts, styles and frames"
        return problem, "show a picture or a plain table, too"
    if visible.has_colour:
        problem = "HTML that speaks through colours: GitHub strips styles"
        return problem, "show image/svg+xml, with colours as attributes"
    return None


def _text(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value)


class _Visible(HTMLParser):
    """What is seen of HTML after scripts and styles are taken out."""

    def __init__(self) -> None:
        super().__init__()
        self.has_content = False
        self.has_colour = False
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif not self._hidden:
            self.has_content |= tag in _PICTURES
            self.has_colour |= bool(_COLOUR.search(dict(attrs).get("style") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _HIDDEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._hidden:
            self.has_colour |= self._hidden[-1] == "style" and bool(_COLOUR.search(data))
        else:
            self.has_content |= bool(data.strip())
