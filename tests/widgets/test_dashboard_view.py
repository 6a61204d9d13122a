"""The dashboard's view in a browser without Jupyter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import LLM, Dashboard

RunView = Callable[..., Any]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[Dashboard]:
    with LLM(device="cpu", dtype="float32", max_num_seqs=4) as llm:
        yield Dashboard(llm)


def request(number: int, status: str, source: str = "cell") -> dict[str, str]:
    row = {"id": str(number), "source": source, "status": status, "prompt": "12"}
    return {**row, "generated": f"{number} / 300", "age": "4.7 s", "pages": "2"}


def test_a_view_follows_the_engine(run_view: RunView, dashboard: Dashboard) -> None:
    busy = {
        **dashboard.state,
        "num_running": 2,
        "num_waiting": 1234,
        "num_blocks": 100,
        "num_used_blocks": 25,
        "num_cached_blocks": 50,
        "generation_rate": 1234.4,
        "curve": [[60, 0, 0], [30, 5, 100], [0, 0, 50]],
        "prefix_hit_share": 0.625,
        "total_prefix_hit_share": 0.25,
        "num_preemptions": 3,
        "num_recent_preemptions": 1,
        "num_by_source": {"server": 2, "cell": 1234},
        "requests": [request(0, "running"), request(1, "running", "<b>"), request(2, "waiting")],
    }
    less = {**busy, "requests": [request(1, "running")], "num_by_source": {"cell": 1}}
    seen = run_view(
        dashboard,
        """
        const part = (name) => el.querySelector(`.nbllm-dashboard-${name}`);
        const tiles = () => [...el.querySelectorAll(".nbllm-dashboard-number")].map(
          (tile) => [...tile.children].map((one) => one.textContent));
        const rows = () => [...el.querySelectorAll("tbody tr")].map(
          (row) => [...row.cells].map((cell) => cell.textContent));
        const idle = { caption: el.querySelector("caption").textContent, rows: rows(),
          head: el.querySelector("thead").hidden };
        change({ state: BUSY });
        const bar = [...part("bar").children].map((one) => one.style.flexGrow);
        const label = part("bar").getAttribute("aria-label");
        const lines = [...el.querySelectorAll("path")].map((path) => path.getAttribute("d"));
        const first = el.querySelector("tbody tr");
        const busy = { tiles: tiles(), rows: rows(),
          caption: el.querySelector("caption").textContent,
          more: part("requests").lastChild.textContent, bar, label, lines };
        change({ state: LESS });
        const kept = first === el.querySelector("tbody tr");
        return { idle, busy, less: rows(), kept, bold: el.querySelectorAll("td b").length };
        """.replace("BUSY", json.dumps(busy)).replace("LESS", json.dumps(less)),
    )
    assert seen["idle"] == {"caption": "No requests", "rows": [], "head": True}
    assert seen["busy"]["tiles"] == [
        ["2", "of 4"],
        ["1,234", ""],
        ["1,234", "tokens/s"],
        ["0", "tokens/s"],
        ["63%", "25% in all"],
        ["3", "1 lately"],
    ]
    assert seen["busy"]["bar"] == ["25", "50", "25"]
    assert seen["busy"]["label"].startswith("KV cache") and "50 cached" in seen["busy"]["label"]
    assert seen["busy"]["lines"][1] == "M0.00 23.00L50.00 1.00L100.00 12.00"
    assert seen["busy"]["rows"][2] == ["2", "cell", "waiting", "12", "2 / 300", "4.7 s", "2"]
    assert seen["busy"]["rows"][1][1] == "<b>" and seen["bold"] == 0
    assert seen["busy"]["caption"] == "Requests: 1,234 cell, 2 server"
    assert seen["busy"]["more"] == "and 1,233 more"
    assert len(seen["less"]) == 1 and seen["kept"]


def test_a_view_says_when_it_is_open_and_what_has_happened(
    run_view: RunView, dashboard: Dashboard
) -> None:
    seen = run_view(
        dashboard,
        """
        const status = el.querySelector("[role=status]");
        const button = el.querySelector("button");
        const states = [status.textContent];
        button.click();
        states.push(status.textContent, button.textContent);
        button.click();
        change({ status: "busy" });
        states.push(status.textContent);
        change({ status: "closed", error: "LLM.close() was called" });
        states.push(status.textContent, el.querySelector("[role=alert]").textContent);
        const isOver = button.hidden && el.querySelector(".nbllm-dashboard-still") !== null;
        change({ state: {} });
        const empty = el.querySelector(".nbllm-dashboard-seen").hidden;
        model.send = (content) => { sent.push(content); throw new Error("the kernel is gone"); };
        cleanup();
        return { states, isOver, empty, sent, saved: saved.map((one) => one.is_paused),
          left: el.children.length, listeners: Object.values(listeners).flat().length };
        """,
    )
    closed = ["closed", "LLM.close() was called"]
    assert seen["states"] == ["live", "paused", "Resume", "busy", *closed]
    assert seen["isOver"] and seen["empty"] and seen["saved"] == [True, False]
    assert [message["type"] for message in seen["sent"]] == ["open", "close"]
    assert seen["sent"][0]["view"] == seen["sent"][1]["view"]
    assert seen["left"] == seen["listeners"] == 0
