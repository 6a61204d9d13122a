"""serve() in a real kernel: a cell that is run again keeps its server's address."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

CELL = """
from nbllm import LLM
llm = LLM(device="cpu")
server = llm.serve()
print(server.url, server.api_key)
"""
ASK = """
with server.client(max_retries=0) as client:
    print([model.id for model in client.models.list()])
"""


@pytest.fixture
def kernel() -> Iterator[BlockingKernelClient]:
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(kernel: BlockingKernelClient, code: str) -> str:
    printed: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    reply = kernel.execute_interactive(code, timeout=60, output_hook=collect)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(printed).strip()


def test_a_cell_with_a_model_and_a_server_can_be_run_again(kernel: BlockingKernelClient) -> None:
    first = run(kernel, CELL)
    assert run(kernel, CELL) == first
    assert run(kernel, ASK) == "['nbllm-demo']"
    assert "replaces" in run(kernel, "print(repr(server))")
