"""Frozen: what is left of a widget in a saved notebook."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

VIEW = "application/vnd.jupyter.widget-view+json"

CELLS = [
    """
    import threading
    import traitlets
    from nbllm.widgets.frozen import Frozen

    class Number(Frozen):
        _esm = "export default { render() {} }"
        value = traitlets.Int(1).tag(sync=True)

        def static_text(self):
            return f"Number {self.value}"

        def static_svg(self):
            return f"<svg><title>{self.value}</title></svg>"

    number, other, live = Number(), Number(value=7), Number(value=20)
    number""",
    "display(number, other)",
    "number.value = 5; live",
    "number.freeze()",
    "thread = threading.Thread(target=other.freeze)\nthread.start()\nthread.join()\nother.freeze()",
    "number.value = 6\nnumber",
    "live.value = 21; live.refresh()",
]


@pytest.fixture(scope="module")
def outputs() -> list[list[Any]]:
    from textwrap import dedent

    cells = [nbformat.v4.new_code_cell(dedent(cell)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [[output.data for output in cell.outputs] for cell in notebook.cells]


def test_a_frozen_widget_is_static_wherever_it_was_shown(outputs: list[list[Any]]) -> None:
    as_last_expression, displayed = outputs[0][0], outputs[1][0]
    assert as_last_expression == displayed
    assert as_last_expression["text/plain"] == "Number 6"
    assert as_last_expression["image/svg+xml"] == "<svg><title>6</title></svg>"
    assert VIEW not in as_last_expression


def test_a_widget_can_be_frozen_from_a_thread_and_twice(outputs: list[list[Any]]) -> None:
    assert outputs[1][1]["text/plain"] == "Number 7" and VIEW not in outputs[1][1]
    assert outputs[3] == outputs[4] == []


def test_a_frozen_widget_that_is_shown_again_is_static(outputs: list[list[Any]]) -> None:
    assert [sorted(data) for data in outputs[5]] == [["image/svg+xml", "text/plain"]]


def test_a_live_widget_has_its_static_forms_beside_it_and_they_can_be_refreshed(
    outputs: list[list[Any]],
) -> None:
    assert sorted(outputs[2][0]) == [VIEW, "image/svg+xml", "text/plain"]
    assert outputs[2][0]["text/plain"] == "Number 21"
    assert outputs[6] == []


def test_it_works_without_a_notebook() -> None:
    from nbllm import SamplingControls

    controls = SamplingControls()
    assert "SamplingControls(max_tokens=256)" in controls._repr_mimebundle_()["text/plain"]
    controls.freeze()
    bundle = controls._repr_mimebundle_()
    assert sorted(bundle) == ["text/html", "text/plain"] and "256" in bundle["text/html"]
    controls.values = {"temperature": 0.5}
    assert controls.params.temperature == 0.5
