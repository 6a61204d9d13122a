"""A cell that makes an LLM can be run again: the first one goes, and its memory with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from nbllm.notebook_cell import NotebookCell, current_cell

MAKE = """
from nbllm import LLM
llm = LLM({folder!r}, skip_tokenizer_init=True, device="cpu")
"""
COUNT = """
import threading
print(sum(thread.name == "nbllm-engine" for thread in threading.enumerate()))
"""


@pytest.fixture
def client() -> Iterator[BlockingKernelClient]:
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str) -> str:
    printed: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=60, output_hook=collect)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(printed).strip()


def test_a_cell_that_is_run_again_closes_the_llm_of_its_first_run(
    client: BlockingKernelClient, make_checkpoint: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    cell = MAKE.format(folder=str(folder))
    run(client, cell)
    run(client, "first = llm")
    run(client, cell)
    assert run(client, COUNT) == "1"
    assert "closed" in run(client, "print(first)")
    assert run(client, "print(len(llm.generate([1, 2, 3])))") == "1"


def test_a_cell_may_make_several_and_other_cells_more(
    client: BlockingKernelClient, make_checkpoint: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    cell = MAKE.format(folder=str(folder))
    run(client, cell + cell.replace("llm =", "other ="))
    run(client, cell.replace("llm =", "third ="))
    assert run(client, COUNT) == "3"


def test_there_is_no_cell_in_a_script() -> None:
    assert current_cell() is None


def test_only_a_later_run_of_the_same_cell_is_a_rerun() -> None:
    first = NotebookCell("a", 1)
    assert NotebookCell("a", 2).is_rerun_of(first)
    assert not NotebookCell("a", 1).is_rerun_of(first)
    assert not NotebookCell("b", 2).is_rerun_of(first)
