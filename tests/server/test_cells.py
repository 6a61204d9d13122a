"""serve() in a real kernel: a cell that is run again keeps its server's address."""

from __future__ import annotations

from collections.abc import Callable

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


def test_a_cell_with_a_model_and_a_server_can_be_run_again(
    run_in_kernel: Callable[[str], str],
) -> None:
    first = run_in_kernel(CELL)
    assert run_in_kernel(CELL) == first
    assert run_in_kernel(ASK) == "['nbllm-demo']"
    assert "replaces" in run_in_kernel("print(repr(server))")
