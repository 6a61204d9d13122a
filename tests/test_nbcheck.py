"""nbcheck: what of a saved notebook is seen where nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nbllm import InvalidRequestError
from nbllm.cli import main
from nbllm.nbcheck import check_notebook

VIEW = "application/vnd.jupyter.widget-view+json"
MODEL = {"version_major": 2, "version_minor": 0, "model_id": "1"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><title>x</title></svg>'
FRAME = pd.DataFrame({"a": [1, 2]})
HEAT_MAP = '<span style="background-color: #fde725">yes</span>'
STYLER = f"<style>#T td {{ background-color: red }}</style>{FRAME.to_html()}"


def write(path: Path, *outputs: Any, **metadata: Any) -> Path:
    """A notebook: some prose, then a cell for each output."""
    cells = [new_markdown_cell("# Title"), *(new_code_cell("x", outputs=[o]) for o in outputs)]
    notebook = new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return path


def shown(**data: Any) -> Any:
    return new_output("display_data", data={k.replace("_", "/", 1): v for k, v in data.items()})


def bundle(data: dict[str, Any]) -> Any:
    return new_output("display_data", data=data)


SEEN = [
    shown(text_plain="42"),
    new_output("stream", text="hello\n"),
    shown(text_html=FRAME._repr_html_(), text_plain=str(FRAME)),
    bundle({VIEW: MODEL, "image/svg+xml": SVG, "text/plain": "heat map"}),
    bundle({VIEW: MODEL, "text/html": "<table><tr><td>1</td></tr></table>"}),
    shown(text_html='<progress value="1" max="1"></progress><code>3 rows</code>'),
    shown(text_html=f'<img src="data:image/png;base64,AAAA">{"<style>p {color: red}</style>"}'),
    bundle({"text/html": HEAT_MAP, "image/svg+xml": SVG}),
    shown(text_html="<script>draw()</script><noscript>none</noscript><p>a table</p>"),
]

UNSEEN = {
    "a widget alone": (bundle({VIEW: MODEL}), "only a live form"),
    "a widget and its repr": (bundle({VIEW: MODEL, "text/plain": "VBox(x)"}), "only a live form"),
    "a script alone": (bundle({"application/javascript": "draw()"}), "only a live form"),
    "a plot alone": (
        bundle({"application/vnd.plotly.v1+json": {"data": []}, "text/plain": "<Figure>"}),
        "only a live form",
    ),
    "html of scripts": (
        shown(text_html="<div id='p'></div><script>draw('p')</script><style>p {}</style>"),
        "HTML without content",
    ),
    "a frame": (shown(text_html="<iframe src='x'>no frames</iframe>"), "HTML without content"),
    "an empty pre": (shown(text_html="<pre>\n</pre>", text_plain=""), "HTML without content"),
    "an Output": (shown(text_plain="Output()"), "an empty output"),
    "colours": (shown(text_html=HEAT_MAP, text_plain="yes"), "speaks through colours"),
    "a Styler": (shown(text_html=STYLER), "speaks through colours"),
    "an error": (
        new_output("error", ename="ValueError", evalue="x", traceback=["x"]),
        "it ends in ValueError",
    ),
}


def test_what_is_seen_everywhere_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "good.ipynb", *SEEN)
    assert check_notebook(path) == []
    assert main(["nbcheck", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: ok\n"


@pytest.mark.parametrize("name", UNSEEN)
def test_what_would_be_blank_is_found_in_its_cell(tmp_path: Path, name: str) -> None:
    output, problem = UNSEEN[name]
    findings = check_notebook(write(tmp_path / "x.ipynb", SEEN[0], output))
    assert [finding.cell for finding in findings] == [3]
    assert problem in findings[0].problem and findings[0].remedy


def test_widgets_without_state_hide_the_whole_notebook(tmp_path: Path) -> None:
    state = "application/vnd.jupyter.widget-state+json"
    good = {state: {"state": {}, "version_major": 2, "version_minor": 0}}
    assert check_notebook(write(tmp_path / "good.ipynb", widgets=good)) == []
    for bad in ({state: {"version_major": 2}}, {}):
        (finding,) = check_notebook(write(tmp_path / "bad.ipynb", widgets=bad))
        assert finding.cell is None and "delete metadata.widgets" in str(finding)


def test_large_outputs_are_found(tmp_path: Path) -> None:
    half = new_output("stream", text="x" * 600_000)
    assert check_notebook(write(tmp_path / "small.ipynb", half)) == []
    (finding,) = check_notebook(write(tmp_path / "large.ipynb", half, half))
    assert "1.2 MB" in finding.problem


def test_there_is_a_line_for_each_finding_and_all_files_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [output for output, _ in UNSEEN.values()]
    bad = write(tmp_path / "bad.ipynb", *outputs)
    good = write(tmp_path / "good.ipynb", *SEEN)
    assert main(["nbcheck", str(bad), str(good)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(outputs) + 1
    assert lines[0] == (
        f"{bad}: cell 2: only a live form ({VIEW}), which needs a kernel or scripts; "
        "freeze() the widget, or show a picture, too"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is no notebook"),
        ("[1]", "has no nbformat"),
        ('{"nbformat": 4}', "has no cells"),
        ('{"nbformat": 3, "worksheets": []}', "has format 3"),
        ("\xff", "is no notebook"),
    ],
)
def test_a_file_that_is_no_notebook_is_an_error_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    path = tmp_path / "x.ipynb"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidRequestError, match=problem):
        check_notebook(path)
    good = write(tmp_path / "good.ipynb", *SEEN)
    assert main(["nbcheck", str(path), str(good)]) == 2
    printed = capsys.readouterr()
    assert problem in printed.err and f"{good}: ok" in printed.out
    assert main(["nbcheck", str(tmp_path / "missing.ipynb")]) == 2
    assert "No such file" in capsys.readouterr().err
