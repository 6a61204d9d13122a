"""Other people's clients, which are told a base URL and nothing else of nbllm.

Each program of clients/ runs in a process of its own, where it can reach this machine only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nbllm import LLM, SamplingParams
from nbllm.server.serve import Server

CLIENTS = Path(__file__).parent / "clients"
PROGRAMS = ["langchain_chat", "instructor_modes", "litellm_calls", "openai_client"]
MODEL = "nbllm-demo"


def start(program: Path, home: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    quiet = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it downloads one
        "LANGSMITH_TRACING": "false",
        "DO_NOT_TRACK": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(CLIENTS / "offline.py"), str(program)],
        env=quiet | variables,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def running(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All programs at once: most of their time is their imports."""
    variables = {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": server.api_key or ""}
    processes = {
        name: start(CLIENTS / f"{name}.py", tmp_path_factory.mktemp(name), variables)
        for name in PROGRAMS
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_works_that_knows_no_more_than_the_base_url(
    running: dict[str, subprocess.Popen[str]], name: str
) -> None:
    said, _ = running[name].communicate(timeout=300)
    assert running[name].returncode == 0, said


def test_a_client_that_reaches_for_the_network_would_be_seen(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import contextlib, socket\n"
        "with contextlib.suppress(OSError):\n"
        "    socket.create_connection(('telemetry.example', 443))\n"
    )
    process = start(program, tmp_path, {})
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "telemetry.example" in said


def test_every_program_is_run() -> None:
    assert {path.stem for path in CLIENTS.glob("*.py")} == {*PROGRAMS, "offline"}


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def curl(server: Server, *arguments: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "60", *arguments],
        env={"PATH": os.environ["PATH"], "OPENAI_API_KEY": server.api_key or ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def post(server: Server, path: str, body: Any, *arguments: str) -> str:
    headers = ["-H", "Content-Type: application/json"]
    headers += ["-H", f"Authorization: Bearer {server.api_key}"]
    return curl(server, server.base_url + path, *headers, "-d", json.dumps(body), *arguments)


@needs_curl
def test_curl_lists_the_models(server: Server) -> None:
    reply = curl(server, f"{server.base_url}/models", "-H", f"X-API-Key: {server.api_key}")
    assert [model["id"] for model in json.loads(reply)["data"]] == [MODEL]


@needs_curl
def test_curl_completes_a_text(llm: LLM, server: Server) -> None:
    body = {"model": MODEL, "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}
    reply = json.loads(post(server, "/completions", body))
    params = SamplingParams(temperature=0, max_tokens=7)
    (ours,) = llm.generate("San Francisco is a", params, use_tqdm=False)
    assert reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == ours.outputs[0].text
    assert reply["choices"][0]["finish_reason"] == ours.outputs[0].finish_reason
    assert reply["usage"]["completion_tokens"] == len(ours.outputs[0].token_ids)


@needs_curl
@pytest.mark.parametrize("question", ["Who won the world series in 2020?", "Tell me a joke."])
def test_curl_chats(llm: LLM, server: Server, question: str) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": question},
    ]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 32}
    message = json.loads(post(server, "/chat/completions", body))["choices"][0]["message"]
    params = SamplingParams(temperature=0, max_tokens=32)
    (ours,) = llm.chat(messages, params, use_tqdm=False)
    assert message["role"] == "assistant"
    assert message["content"] == ours.outputs[0].text
    streamed = post(server, "/chat/completions", body | {"stream": True}, "--no-buffer")
    chunks = [json.loads(data) for data in re.findall(r"^data: ({.*})$", streamed, re.MULTILINE)]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == message["content"]


@needs_curl
def test_the_cards_curl_snippet_works(server: Server) -> None:
    from nbllm.server.card import curl_snippet

    snippet = curl_snippet(server.base_url, has_key=True)
    done = subprocess.run(
        ["sh", "-c", snippet],
        env={"PATH": os.environ["PATH"], "NBLLM_API_KEY": server.api_key or ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
