"""The dashboard and the server's card in a real JupyterLab, while a cell runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.browser

Write = Callable[..., str]

SETUP = """\
from IPython.display import display
from nbllm import LLM, Dashboard, SamplingParams

llm = LLM(device="cpu", dtype="float32", max_num_seqs=8)
server = llm.serve(api_key=None)
display(server)
dashboard = Dashboard(llm, interval_s=0.2)
dashboard"""
LONG = """\
params = SamplingParams(max_tokens=900, ignore_eos=True)
outputs = llm.generate(["Once"] * 64, params)"""


def test_a_dashboard_follows_a_cell_that_runs(lab: Any, write: Write) -> None:
    end = "server.stop(); llm.close(); print(dashboard.is_looking, 'at the end')"
    lab.open(write("dashboard.ipynb", SETUP, LONG, end))
    lab.start("notebook:run-all-cells")
    view = lab.page.locator(".nbllm-dashboard")
    view.get_by_text("Requests: 64 cell").wait_for()
    lab.page.wait_for_function(
        "() => [...document.querySelectorAll('.nbllm-dashboard-cell-generated')]"
        ".some((cell) => /^[1-9]/.test(cell.textContent))"
    )
    assert view.locator("tbody tr").count() == 50
    lab.screenshot("dashboard")
    lab.command("notebook:interrupt-kernel")
    lab.output("Interrupted").wait_for()
    lab.wait_for_idle()
    view.get_by_text("No requests").wait_for()
    lab.go_to_last_cell()
    lab.command("notebook:run-cell")
    lab.output("at the end").wait_for()
    view.get_by_text("LLM.close() was called").wait_for()
    lab.output("nbllm-demo, stopped").wait_for()
    lab.screenshot("dashboard_closed")
