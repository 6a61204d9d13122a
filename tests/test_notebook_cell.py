"""A cell that makes an LLM can be run again: the first one goes, and its memory with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbllm.notebook_cell import NotebookCell, current_cell

MAKE = """
from nbllm import LLM
llm = LLM({folder!r}, skip_tokenizer_init=True, device="cpu")
"""
COUNT = """
import threading
print(sum(thread.name == "nbllm-engine" for thread in threading.enumerate()))
"""


def test_a_cell_that_is_run_again_closes_the_llm_of_its_first_run(
    run_in_kernel: Callable[[str], str], make_checkpoint: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    cell = MAKE.format(folder=str(folder))
    run_in_kernel(cell)
    run_in_kernel("first = llm")
    run_in_kernel(cell)
    assert run_in_kernel(COUNT) == "1"
    assert "closed" in run_in_kernel("print(first)")
    assert run_in_kernel("print(len(llm.generate([1, 2, 3])))") == "1"


def test_a_cell_may_make_several_and_other_cells_more(
    run_in_kernel: Callable[[str], str], make_checkpoint: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    cell = MAKE.format(folder=str(folder))
    run_in_kernel(cell + cell.replace("llm =", "other ="))
    run_in_kernel(cell.replace("llm =", "third ="))
    assert run_in_kernel(COUNT) == "3"


def test_there_is_no_cell_in_a_script() -> None:
    assert current_cell() is None


def test_only_a_later_run_of_the_same_cell_is_a_rerun() -> None:
    first = NotebookCell("a", 1)
    assert NotebookCell("a", 2).is_rerun_of(first)
    assert not NotebookCell("a", 1).is_rerun_of(first)
    assert not NotebookCell("b", 2).is_rerun_of(first)
