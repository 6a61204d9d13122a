"""What a cell shows of a server while requests come: in a real kernel."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from nbllm import LLM
from nbllm.server.card import requests_table
from nbllm.server.request_log import RequestLog

CELLS = [
    """
    import json, time, urllib.request
    import nbllm

    llm = nbllm.LLM(device="cpu")
    server = llm.serve(api_key=None)
    server""",
    "server",
    """
    body = {"prompt": "Once upon a time", "max_tokens": 3, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}

    def ask():
        request = urllib.request.Request(
            server.base_url + "/completions", json.dumps(body).encode(), headers)
        json.load(urllib.request.urlopen(request))

    def updated(text):
        deadline = time.monotonic() + 30
        while text not in json.dumps(shown) and time.monotonic() < deadline:
            time.sleep(0.01)

    from IPython.display import display
    from nbllm.server.live_card import LiveCard

    shown = []  # what went to the frontend
    update = LiveCard._update
    LiveCard._update = lambda *arguments: (update(*arguments), shown.append(arguments[2]))
    ask()
    updated("1 ended")""",
    "server.restart(); ask(); updated('2 ended')",
    """
    server.stop()
    deadline = time.monotonic() + 30
    while server._card._follower is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    print(len(shown))""",
]


@pytest.fixture(scope="module")
def outputs() -> list[list[Any]]:
    cells = [nbformat.v4.new_code_cell(dedent(cell)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [list(cell.outputs) for cell in notebook.cells]


def test_every_cell_that_shows_a_server_has_its_last_state(outputs: list[list[Any]]) -> None:
    for card, requests in outputs[:2]:
        assert "<code>nbllm-demo</code>, stopped" in card.data["text/html"]
        assert card.data["text/plain"].startswith("Server(stopped")
        assert "0 running, 2 ended, 0 failed" in requests.data["text/plain"]
        assert requests.data["text/html"].count("<td>/v1/completions</td>") == 2


def test_only_what_has_changed_is_shown_again(outputs: list[list[Any]]) -> None:
    assert outputs[2] == outputs[3] == []
    # Two requests, a restart and a stop, each seen in a few steps at most.
    assert 4 <= int(outputs[4][0].text) <= 20


def test_outside_of_a_notebook_a_server_is_shown_as_before(llm: LLM) -> None:
    from IPython.core.formatters import DisplayFormatter

    with llm.serve(api_key=None) as server:
        data, _ = DisplayFormatter().format(server)
        assert server._card._follower is None
    assert data["text/plain"].startswith("Server(http://127.0.0.1:")
    assert "base_url" in data["text/html"]


def test_what_a_client_wrote_is_no_html() -> None:
    log = RequestLog()
    for _ in range(3):
        log.begin("/<script>alert(1)</script>")
    table = requests_table(log.stats, log.recent(2))
    assert table.count("&lt;script&gt;") == 2 and "<script" not in table
    assert "3 running" in table and table.count("<td>running</td>") == 2
