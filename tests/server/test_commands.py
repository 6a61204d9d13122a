"""nbllm serve, chat, complete and run-batch, as processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
}
ENGINE = ["--device", "cpu", "--max-model-len", "256"]


def nbllm(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbllm.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env=ENVIRONMENT,
    )


@contextmanager
def serving(*command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+/v1", line)
        assert found is not None, (line, process.communicate(timeout=30))
        yield found[0], process
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("nbllm.cli", "serve", "--port", "0", *ENGINE) as (url, _):
        yield url


def test_a_server_of_a_shell_answers_the_client(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        reply = client.completions.create(model="nbllm-demo", prompt="What is 17 + 25?")
    assert reply.choices[0].text.strip() == "42"


def test_a_chat_goes_on_over_several_lines(url: str) -> None:
    done = nbllm("chat", "--url", url, stdin="What is the capital of France?\n\nWhat is 17 + 25?\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "42" in done.stdout
    quick = nbllm("chat", "--url", url, "-q", "What is the capital of Peru?")
    assert "Lima" in quick.stdout and quick.stdout.count("\n") == 1


def test_a_text_is_completed(url: str) -> None:
    done = nbllm("complete", "--url", url, "--max-tokens", "4", "-q", "What is 17 + 25?")
    assert (done.returncode, done.stdout.strip()) == (0, "42")


def test_a_client_without_a_server_says_what_to_do() -> None:
    done = nbllm("chat", "--url", "http://127.0.0.1:9/v1", "-q", "Hi")
    assert done.returncode == 1
    assert "nbllm serve" in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_is_told_to_end_answers_what_it_has_begun(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("port: 0\nserved-model-name: small\nmax_model_len: 256\ndevice: cpu\n")
    command = ["nbllm.server", "--config", str(config), "--api-key", "one", "two"]
    with (
        serving(*command) as (url, process),
        openai.OpenAI(base_url=url, api_key="two", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model="small",
            prompt="Once",
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks: list[Any] = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_a_wrong_option_of_a_config_is_named(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("max-model-length: 5\n")
    done = nbllm("serve", "--config", str(config))
    assert done.returncode == 1
    assert "max-model-length" in done.stderr and "Traceback" not in done.stderr


def test_a_batch_is_answered_line_by_line(tmp_path: Path) -> None:
    def line(name: str, body: Any, url: str = "/v1/completions") -> str:
        return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})

    question = "What is the capital of France?"
    chat = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    lines = [
        line("sum", {"prompt": "What is 17 + 25?", "temperature": 0}),
        line("chat", chat, "/v1/chat/completions"),
        line("vector", {"input": question, "dimensions": 4}, "/v1/embeddings"),
        line("wrong value", {"prompt": "x", "temperature": -1}),
        line("wrong route", {}, "/v1/files"),
        line("stream", {"prompt": "x", "stream": True}),
        "no JSON",
        "",
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    done = nbllm("run-batch", "-i", str(source), "-o", str(target), *ENGINE)
    assert done.returncode == 1, done.stderr  # some lines are wrong
    replies = {r["custom_id"]: r for r in map(json.loads, target.read_text().splitlines())}
    names = {"sum", "chat", "vector", "wrong value", "wrong route", "stream", None}
    assert set(replies) == names
    assert len(replies["vector"]["response"]["body"]["data"][0]["embedding"]) == 4
    assert replies["sum"]["response"]["body"]["choices"][0]["text"].strip() == "42"
    message = replies["chat"]["response"]["body"]["choices"][0]["message"]
    assert "Paris" in message["content"] and replies["chat"]["error"] is None
    assert replies["wrong value"]["response"]["status_code"] == 400
    assert replies["wrong value"]["error"]["param"] == "temperature"
    for name in ("wrong route", "stream", None):
        assert replies[name]["response"] is None and replies[name]["error"]["message"]
