"""Progress in a terminal, in a log file and in a notebook's real kernel."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import progress
from nbllm.progress import progress_bar


class Clock:
    """Stands in for the module `time`: it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


# -- log file -------------------------------------------------------------------------------------


def test_a_log_gets_a_plain_line_every_30_seconds(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    bar = progress_bar(100, "Generating", unit="prompt")
    for _ in range(90):
        clock.now += 1.0
        bar.update(1, tokens=50)
    clock.now += 10.0
    bar.update(10, tokens=500)
    bar.close()
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert lines[0] == "Generating: 30/100 prompts, 1.0/s, 50 tokens/s, 1:10 left"
    assert len(lines) == 4
    assert lines[-1] == "Generating: 100/100 prompts, 1.0/s, 50 tokens/s, 1:40"
    assert "\r" not in shown and "\x1b" not in shown


def test_a_line_tells_of_the_prefix_cache_and_of_the_kv_cache(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    usage = iter([0.25])
    bar = progress_bar(4, "Generating", gauge=lambda: next(usage))
    bar.update(1, prompt_tokens=30, cached_tokens=0)
    clock.now += 40.0
    bar.update(1, prompt_tokens=10, cached_tokens=10, failed=1)
    bar.update(2)
    bar.close()
    first, last = capsys.readouterr().err.splitlines()
    counts = "0.1/s, 25% prefix hits, 1 failed"
    assert first == f"Generating: 2/4 rows, {counts}, KV cache 25%, 40.0 s left"
    # Nothing of the call is in the cache any more.
    assert last == f"Generating: 4/4 rows, {counts}, 40.0 s"


def test_a_short_call_leaves_no_trace_in_a_log(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    bar = progress_bar(3, "Generating")
    clock.now += 29.0
    bar.update(3)
    bar.close()
    bar.close()
    assert capsys.readouterr().err == ""


def test_a_call_that_was_stopped_has_nothing_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    bar = progress_bar(4, "Generating")
    bar.update(1, failed=1)
    clock.now += 3700.0
    bar.close()
    assert capsys.readouterr().err == "Generating: 1/4 rows, 0.0/s, 1 failed, 1:01:40\n"


def test_an_unknown_total_is_left_out(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    bar = progress_bar(None, "Rows")
    clock.now += 31.0
    bar.update(1)
    assert capsys.readouterr().err == "Rows: 1 row, 0.0/s, 31.0 s\n"


def test_there_may_be_no_stderr_or_a_closed_one(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    bar = progress_bar(2, "Generating")
    clock.now += 60.0
    bar.update(2)
    bar.close()
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    progress_bar(2, "Generating").close()


# -- terminal -------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_that_is_rewritten_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_bar(4, "Generating", unit="prompt")
    for _ in range(4):
        bar.update(1, tokens=10)
    bar.close()
    shown = stream.getvalue()
    assert "\r" in shown and shown.endswith("\n")
    last = shown.rstrip("\n").split("\r")[-1]
    assert "Generating: 100%" in last and "4/4" in last and "tokens/s" in last


def test_a_terminals_bar_tells_of_failures_and_of_the_prefix_cache() -> None:
    class Bar:
        postfix = ""

        def __init__(self, **_: Any) -> None: ...

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            Bar.postfix = text

        def update(self, count: int) -> None: ...

    bar = progress_bar(4, "Generating", enabled=Bar)
    bar.update(2, tokens=0, prompt_tokens=8, cached_tokens=2, failed=1)
    assert Bar.postfix == "0 tokens/s, 25% prefix hits, 1 failed"


# -- what the caller says -------------------------------------------------------------------------


def test_false_shows_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    bar = progress_bar(10, "Generating", enabled=False)
    clock.now += 100.0
    bar.update(10, tokens=3)
    bar.close()
    assert capsys.readouterr().err == ""


def test_a_callable_makes_the_bar_as_in_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.count, self.is_closed = options, 0, False
            made.append(self)

        def update(self, count: int) -> None:
            self.count += count

        def close(self) -> None:
            self.is_closed = True

    bar = progress_bar(5, "Generating", enabled=Bar, unit="prompt")
    bar.update(2, tokens=7)
    bar.update(3)
    bar.close()
    assert made[0].options == {"total": 5, "desc": "Generating", "unit": "prompt"}
    assert (made[0].count, made[0].is_closed, capsys.readouterr().err) == (5, True, "")


# -- notebook -------------------------------------------------------------------------------------

CELL = """
import threading, time
from nbllm.progress import progress_bar
bar = progress_bar(3, "Generating <b>", unit="prompt")
def work():
    for _ in range(3):
        time.sleep(0.15)
        bar.update(1, tokens=5)
        bar.update(0)
        bar.update(0)
thread = threading.Thread(target=work)
thread.start()
thread.join()
bar.close()
bar.close()
"""


@pytest.fixture(scope="module")
def cell_messages() -> Iterator[list[dict[str, Any]]]:
    """What a real kernel sends to the front end while it runs `CELL`."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        messages: list[dict[str, Any]] = []
        keep: Callable[[dict[str, Any]], None] = messages.append
        reply = client.execute_interactive(CELL, timeout=60, output_hook=keep)
        assert reply["content"]["status"] == "ok", reply["content"]
        yield messages
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_notebook_gets_one_output_that_is_updated_in_place(
    cell_messages: list[dict[str, Any]],
) -> None:
    shown = [m for m in cell_messages if "display_data" in m["msg_type"]]
    assert shown[0]["msg_type"] == "display_data"
    assert {m["msg_type"] for m in shown[1:]} == {"update_display_data"}
    assert len({m["content"]["transient"]["display_id"] for m in shown}) == 1
    assert not [m for m in cell_messages if m["msg_type"] == "stream"]
    assert 3 <= len(shown) <= 6  # at most ten updates a second


def test_what_stays_in_the_saved_notebook_is_the_final_state(
    cell_messages: list[dict[str, Any]],
) -> None:
    last = [m for m in cell_messages if "display_data" in m["msg_type"]][-1]["content"]["data"]
    json.dumps(last)
    text = last["text/plain"]
    assert re.fullmatch(r"Generating <b>: 3/3 prompts, [\d.,]+/s, [\d,]+ tokens/s, [\d.]+ s", text)
    assert 'value="1.000"' in last["text/html"]
    assert "&lt;b&gt;" in last["text/html"] and "<b>" not in last["text/html"]
