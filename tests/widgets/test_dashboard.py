"""Dashboard: what it says of an engine that works, is busy, fails, is closed, is gone."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from nbllm import LLM, Dashboard, EngineDeadError, InvalidRequestError, Playground, SamplingParams
from nbllm.outputs import EngineSnapshot
from nbllm.widgets import dashboard as dashboard_module
from nbllm.widgets.engine_history import EngineHistory

LONG = SamplingParams(max_tokens=900, ignore_eos=True, temperature=0)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_num_seqs=4) as llm:
        yield llm


@pytest.fixture
def dashboard(llm: LLM) -> Iterator[Dashboard]:
    dashboard = Dashboard(llm, interval_s=0.05)
    yield dashboard
    dashboard.stop()


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.002)


@contextmanager
def in_flight(llm: LLM, prompts: Sequence[str]) -> Iterator[None]:
    """So many long requests are in the engine."""
    with llm._call(llm._rows(prompts, LONG, None)) as call:
        assert not list(call.submit())
        wait_until(lambda: llm.get_metrics()["num_steps"])
        yield


@contextmanager
def held_engine(llm: LLM) -> Iterator[None]:
    """The engine's thread does nothing; it takes what was sent meanwhile at once at the end."""
    is_held, release = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        is_held.set()
        assert release.wait(60)

    thread = threading.Thread(target=llm._thread.call, args=(hold,))
    thread.start()
    assert is_held.wait(30)
    try:
        yield
    finally:
        release.set()
        thread.join()


def send(dashboard: Dashboard, kind: str, view: str = "1") -> None:
    dashboard._handle_custom_msg({"type": kind, "view": view}, [])


def test_numbers_are_those_of_the_requests_that_run(llm: LLM) -> None:
    llm.reset_prefix_cache()
    dashboard = Dashboard(llm)
    assert dashboard.state["requests"] == [] and dashboard.state["num_used_blocks"] == 0
    with in_flight(llm, [f"The fox number {i} said" for i in range(6)]):
        wait_until(lambda: dashboard._look() and dashboard.state["generation_rate"] > 0)
        state = dashboard.state
    assert (state["num_running"], state["max_num_seqs"], state["num_waiting"]) == (4, 4, 2)
    assert state["num_by_source"] == {"cell": 6}
    rows = state["requests"]
    assert [row["status"] for row in rows] == ["running"] * 4 + ["waiting"] * 2
    pages = [int(row["pages"]) for row in rows]
    assert sum(pages) == state["num_used_blocks"] and min(pages[:4]) > 0 and pages[4:] == [0, 0]
    num_prompt_tokens = len(llm.get_tokenizer().encode("The fox number 0 said"))
    assert rows[0]["prompt"] == str(num_prompt_tokens)
    generated, limit = rows[0]["generated"].split(" / ")
    assert int(generated) > 0 and int(limit) == 900 and rows[5]["generated"] == "0 / 900"
    assert state["num_blocks"] == llm.snapshot().num_blocks
    dashboard._look()
    assert dashboard.state["num_by_source"] == {} and dashboard.state["num_used_blocks"] == 0


def test_each_face_is_named(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["Once", "Twice"]})
    playground = Playground(llm, "A cell", params=SHORT)
    seen: list[EngineSnapshot] = []
    with llm.serve(api_key=None) as server, server.client() as client:
        asks: list[Callable[[], Any]] = [
            lambda: frame.llm.generate("q", SHORT, llm=llm, chat=False, use_tqdm=False),
            lambda: frame.llm.embed("q", llm=llm, use_tqdm=False),
            lambda: client.completions.create(model="nbllm-demo", prompt="Once", max_tokens=3),
            lambda: client.embeddings.create(model="nbllm-demo", input="Once"),
            lambda: playground.run().wait(),
            lambda: llm.generate("Once", SHORT),
            lambda: seen.append(llm.snapshot()),
        ]
        threads = [threading.Thread(target=ask) for ask in asks]
        with held_engine(llm):
            for number, thread in enumerate(threads, start=1):
                thread.start()
                wait_until(lambda number=number: llm._thread._inbox.qsize() == number)
        for thread in threads:
            thread.join()
    assert seen[0].num_by_source == {"dataframe": 4, "server": 2, "widget": 1, "cell": 1}
    embedded = [r.source for r in seen[0].requests if r.max_tokens == 0]
    assert embedded == ["dataframe", "dataframe", "server"]
    assert [r.status for r in llm.snapshot(0).requests] == []


def test_a_list_of_requests_can_be_cut(llm: LLM) -> None:
    with in_flight(llm, ["Once"] * 6):
        snapshot = llm.snapshot(5)
    assert [request.status for request in snapshot.requests] == ["running"] * 4 + ["waiting"]
    assert snapshot.num_by_source == {"cell": 6}


def test_it_looks_while_a_view_is_open(dashboard: Dashboard) -> None:
    assert not dashboard.is_looking
    send(dashboard, "open")
    send(dashboard, "open", view="2")
    send(dashboard, "close")
    assert dashboard.is_looking
    first = dashboard.state["curve"]
    wait_until(lambda: dashboard.state["curve"] != first)
    send(dashboard, "close", view="2")
    assert not dashboard.is_looking
    wait_until(lambda: not dashboard._poller._thread.is_alive())
    send(dashboard, "open")
    assert dashboard.is_looking


def test_it_does_not_look_while_it_is_paused(dashboard: Dashboard) -> None:
    send(dashboard, "open")
    dashboard.is_paused = True  # the button
    assert not dashboard.is_looking
    send(dashboard, "open", view="2")
    assert not dashboard.is_looking
    dashboard.is_paused = False
    assert dashboard.is_looking
    dashboard.stop()
    assert dashboard.is_paused and not dashboard.is_looking
    dashboard.start()
    assert dashboard.is_looking and not dashboard.is_paused


def test_showing_it_is_enough(dashboard: Dashboard) -> None:
    bundle = dashboard._repr_mimebundle_()  # the view's message would wait for the cell's end
    assert dashboard.is_looking
    assert "KV cache: " in bundle["text/plain"] and "No requests" in bundle["text/plain"]


def test_a_busy_engine_keeps_nobody_waiting(
    llm: LLM, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_module, "_TIMEOUT_S", 0.02)
    dashboard.start()
    wait_until(lambda: dashboard.status == "live")
    with held_engine(llm):
        wait_until(lambda: dashboard.status == "busy")
        started = time.monotonic()
        dashboard.stop()
        assert time.monotonic() - started < 1
        dashboard.start()
        with pytest.raises(TimeoutError, match=r"busy for 0\.01 s"):
            llm.snapshot(timeout_s=0.01)
    wait_until(lambda: dashboard.status == "live")
    assert dashboard.error == ""


def test_a_closed_engine_is_said_to_be_closed() -> None:
    with LLM(device="cpu", dtype="float32") as llm:
        dashboard = Dashboard(llm, interval_s=0.05)
        dashboard.start()
    wait_until(lambda: not dashboard.is_looking)
    assert dashboard.status == "closed" and "LLM.close() was called" in dashboard.error
    assert dashboard.state["num_blocks"] > 0  # what was seen last
    assert "closed: the engine is closed" in dashboard.static_text()
    dashboard.start()
    wait_until(lambda: not dashboard.is_looking)
    assert Dashboard(llm).static_svg() is None


def test_it_does_not_keep_a_model_in_memory() -> None:
    llm = LLM(device="cpu", dtype="float32")
    dashboard = Dashboard(llm)
    del llm
    gc.collect()
    assert not dashboard._look()
    assert dashboard.status == "closed" and "nothing refers to it" in dashboard.error


def test_a_dead_engine_is_said_to_have_failed() -> None:
    def fail() -> None:
        raise EngineDeadError("the device is lost")

    with LLM(device="cpu", dtype="float32") as llm:
        dashboard = Dashboard(llm, interval_s=0.05)
        dashboard.start()
        llm._thread.call(lambda engine: setattr(engine, "step", fail))
        with pytest.raises(EngineDeadError):
            llm.generate("Once", SHORT)
        wait_until(lambda: not dashboard.is_looking)
    assert (dashboard.status, dashboard.error) == ("failed", "the device is lost")


def test_what_is_left_is_a_picture_of_the_last_moment(llm: LLM, dashboard: Dashboard) -> None:
    dashboard.start()
    with in_flight(llm, ["Once <upon>"] * 5):
        dashboard.freeze()
        assert not dashboard.is_looking
    bundle = dashboard._repr_mimebundle_()
    assert sorted(bundle) == ["image/svg+xml", "text/plain"] and not dashboard.is_looking
    assert "Requests: 5 cell" in bundle["text/plain"]
    picture = ElementTree.fromstring(bundle["image/svg+xml"])
    assert picture.get("role") == "img" and "style" not in bundle["image/svg+xml"]
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("running") == 4 and texts.count("waiting") == 1
    send(dashboard, "open")
    assert not dashboard.is_looking


def snapshot_of(prompt: int, generated: int, queries: int, hits: int, preempted: int) -> Any:
    metrics = {
        "prompt_tokens_by_source_local_compute": prompt,
        "generation_tokens": generated,
        "prefix_cache_queries": queries,
        "prefix_cache_hits": hits,
        "num_preemptions": preempted,
    }
    return EngineSnapshot(metrics, (), {}, 32, 10, 0, 0)


def test_rates_are_those_of_the_last_seconds_and_shares_of_the_last_minute() -> None:
    history = EngineHistory()
    assert history.rates == (0, 0) and history.curve() == []
    assert history.prefix_hit_share is None and history.num_preemptions == 0
    for second in range(101):
        generated = min(second, 50) * 10 + max(second - 50, 0) * 30
        hits = max(second - 70, 0) * 4  # of 8 tokens each
        snapshot = snapshot_of(second * 5, generated, second * 8, hits, second // 90)
        for time_s in (second, second + 0.1):
            history.add(snapshot, time_s)
    assert history.rates == pytest.approx((5 * 2 / 2.1, 30 * 2 / 2.1))
    curve = history.curve()
    assert len(curve) == 61 and curve[0][0] == pytest.approx(59.1)
    assert curve[1][1] == (5, 10) and curve[-2][1] == (5, 30)
    assert history.prefix_hit_share == pytest.approx(30 * 4 / (60 * 8))
    assert history.num_preemptions == 1


@pytest.mark.parametrize(("name", "value"), [("interval_s", 0), ("interval_s", "1"), ("llm", "x")])
def test_a_wrong_argument_is_named(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        Dashboard(**{"llm": llm, name: value})
