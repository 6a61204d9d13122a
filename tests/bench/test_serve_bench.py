"""`nbllm bench --serve` measures real servers, checks their texts and counts what fails."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbllm import LLM, InvalidRequestError, NbllmError
from nbllm.bench import run as bench
from nbllm.bench.cpu_times import CpuTimes, count_hand_over
from nbllm.bench.serve_bench import check_texts, fail_short, latencies, make_body
from nbllm.bench.server_process import ServerProcess
from nbllm.bench.stream_client import Stream, run_streams
from nbllm.server.handle import Server

SMALL = ("--concurrency", "2", "--requests", "4", "--max-tokens", "10")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--serve", "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_model_len=256) as llm:
        yield llm


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    with llm.serve() as server:
        yield server


def test_both_servers_are_measured_and_every_text_is_as_it_is_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = bench.run(parse(*SMALL, "--peer", "transformers", "--peer-concurrency", "1"))
    *lines, last = capsys.readouterr().out.splitlines()
    result: dict[str, Any] = json.loads(last)
    assert code == 0
    many, few, peer = result["serve"]
    assert [run["server"] for run in (many, few, peer)] == ["nbllm", "nbllm", "transformers"]
    assert [run["concurrency"] for run in (many, few, peer)] == [2, 1, 1]
    assert [run["requests"] for run in (many, few, peer)] == [4, 4, 4]
    for run in (many, few, peer):
        assert run["tokens"] == run["requests"] * 10
        assert (run["errors"], run["wrong_texts"], run["mixed_up"]) == (0, 0, 0)
        assert run["distinct_texts"] > 1
        assert 0 < run["pieces_per_token"] <= 1
        assert 0 < run["ttft_s"]["p50"] <= run["ttft_s"]["p99"] <= run["seconds"]
        assert 0 < run["inter_token_s"]["p50"] <= run["inter_token_s"]["p99"]
        cpu = run["cpu_us_per_token"]
        assert cpu["client"] > 0 and cpu["process"] > 0
        if sys.platform == "linux":
            assert 0 < cpu["server"] < cpu["process"]
    assert result["ratio"]["process"] > 0
    assert result["versions"]["fastapi"]
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split()[1] for row in rows] == ["nbllm", "nbllm", "transformers"]
    assert all(row.endswith("| 0, 0 |") for row in rows)


def test_an_error_inside_a_stream_is_counted(llm: LLM, server: Server) -> None:
    """The server stops while it streams, and says so in each stream."""
    bodies = [make_body("completions", number, 240) for number in range(3)]

    async def run() -> list[Stream]:
        url = server.base_url + "/completions"
        options = {"concurrency": 3, "api_key": server.api_key}
        running = asyncio.create_task(asyncio.to_thread(run_streams, url, bodies, **options))
        while llm.get_metrics()["num_requests_running"] < 3 and not running.done():
            await asyncio.sleep(0.005)
        await asyncio.to_thread(server.stop, 0.0)
        streams, _, _ = await running
        return streams

    streams = asyncio.run(run())
    assert all("the server stops" in str(stream.error) for stream in streams)
    checked = check_texts(streams, [])
    assert (checked["errors"], checked["wrong_texts"]) == (3, 0)
    assert latencies(streams, 240, 1.0)["tokens"] == 0


def test_a_refused_request_and_an_absent_server_are_counted(server: Server) -> None:
    url = server.base_url + "/chat/completions"
    bodies = [make_body("chat", number, 4) for number in range(3)]
    bodies[1]["model"] = "another"
    streams, _, _ = run_streams(url, bodies, concurrency=2, api_key=server.api_key)
    assert [stream.error is None for stream in streams] == [True, False, True]
    assert str(streams[1].error).startswith("status 404: ") and "nbllm" in str(streams[1].error)
    assert len(streams[0].times) == 4 and streams[0].text == "Once upon a time"
    assert streams[0].num_tokens == 4
    server.stop()
    (refused,), _, _ = run_streams(url, bodies[:1], concurrency=1)
    assert "Connect" in str(refused.error)


def test_a_text_of_another_prompt_and_a_changed_one_are_told_apart() -> None:
    alone = [Stream(number, 0.0, text) for number, text in enumerate(["one", "two", "three"])]
    streams = [Stream(number, 0.0, text) for number, text in enumerate(["one", "three", "thre"])]
    checked = check_texts(streams, alone)
    assert (checked["errors"], checked["wrong_texts"], checked["mixed_up"]) == (0, 2, 1)
    assert checked["distinct_texts"] == 3
    assert not check_texts(alone, alone)["wrong_texts"]


def test_a_stream_that_is_too_short_is_an_error(server: Server) -> None:
    """The model has no room for so many tokens."""
    url = server.base_url + "/completions"
    streams, _, _ = run_streams(
        url, [make_body("completions", 0, 300)], concurrency=1, api_key=server.api_key
    )
    assert streams[0].error is None
    fail_short(streams, 300)
    assert str(streams[0].error).endswith("tokens instead of 300")


@pytest.mark.skipif(sys.platform != "linux", reason="tells no times of threads")
def test_of_the_models_thread_only_what_hands_a_token_over_is_the_servers() -> None:
    def compute(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def generate() -> None:
        compute(0.1)
        count_hand_over(compute)(0.02)
        done.set()
        may_end.wait(10)

    done, may_end = threading.Event(), threading.Event()
    before = CpuTimes.now()
    thread = threading.Thread(target=generate, name="generate")
    thread.start()
    assert done.wait(30)
    used = CpuTimes.now() - before
    may_end.set()
    thread.join()
    assert used.server is not None and used.server >= 0.02
    assert used.process - used.server >= 0.09


def test_latencies_are_those_of_pieces_of_text() -> None:
    streams = [Stream(0, 10.0, "abc", [11.0, 11.5, 12.5]), Stream(1, 10.0, "d", [13.0])]
    measured = latencies(streams, 4, 4.0)
    assert (measured["tokens"], measured["tokens_per_s"]) == (8, 2.0)
    assert measured["pieces_per_token"] == 0.5
    assert measured["ttft_s"] == {"p50": 2.0, "p99": 3.0}
    assert measured["inter_token_s"] == {"p50": 0.75, "p99": 1.0}
    assert latencies(streams[1:], 4, 1.0)["inter_token_s"] == {"p50": None, "p99": None}


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        (("--concurrency", "0"), "concurrency"),
        (("--requests", "-1"), "requests"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--peer-concurrency", "0"), "peer_concurrency"),
        (("--shape", "qwen3-0.6b"), "shape"),
        (("--temperature", "1"), "temperature"),
        (("--peer", "llama.cpp"), "peer"),
    ],
)
def test_a_wrong_option_is_named_before_anything_starts(
    arguments: tuple[str, ...], parameter: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        bench.run(parse(*arguments))
    assert caught.value.parameter == parameter


def test_options_of_serve_need_it() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(InvalidRequestError, match="--max-tokens needs --serve"):
        bench.run(parser.parse_args(["--max-tokens", "3"]))


def test_a_server_that_does_not_start_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NbllmError, match="ended before it listened"):
        ServerProcess("nbllm", ["--no-such-option"])
    assert "--no-such-option" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_an_interrupt_ends_the_server_too() -> None:
    command = [sys.executable, "-m", "nbllm.cli", "bench", "--serve", "--max-tokens", "900"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "each prompt alone" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # The server has the same pipes: they end only with both.
        process.communicate(timeout=60)
    assert process.returncode == 130
