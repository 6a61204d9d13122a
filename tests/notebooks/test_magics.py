"""`%load_ext nbllm` in a real kernel."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from nbllm import InvalidRequestError
from nbllm.magics import fill_in

CELLS = {  # in the order in which they are run
    "load": """
        %load_ext nbllm
        from types import SimpleNamespace
        import nbllm
        from IPython import get_ipython
        updates, interrupt_at = [], []
        publish = get_ipython().display_pub.publish
        def record(data, *args, **options):
            updates.append((options.get("update", False), data.get("text/plain")))
            if [len(updates)] == interrupt_at:
                interrupt_at.clear()
                raise KeyboardInterrupt
            return publish(data, *args, **options)
        get_ipython().display_pub.publish = record""",
    "none open": "%nbllm ps",
    "model": 'llm = nbllm.LLM(device="cpu", dtype="float32")\nland = "France"',
    "answer": """
        %%llm --temperature 0 --out answer
        What is the capital of {land}?""",
    "kept": "print(repr(answer), _ == answer)",
    "before fields": "numbers, more = [17], SimpleNamespace(value=25)\nempty = ' '",
    "fields": """
        %%llm --temperature 0 --max-tokens 8 --complete
        What is {numbers[0]} + {more.value}?""",
    "before params": """
        controls = nbllm.SamplingControls(nbllm.SamplingParams(temperature=0, max_tokens=20))""",
    "params": """
        %%llm --params controls --stop "is the" --markdown --complete
        The capital of France""",
    "raw": """
        %%llm --raw --llm llm --temperature 0 --max-tokens 2
        {"a": 1}""",
    "before steps": """
        updates.clear()
        get_ipython().run_cell_magic("llm", "--temperature 0 --max-tokens 3", "Hello")""",
    "steps": "print(len(updates) >= 2, [u[0] for u in updates[:2]], updates[-1][1] == _)",
    "interrupted": """
        updates.clear()
        interrupt_at.append(3)  # the output, the first text, the second one
        get_ipython().run_cell_magic("llm", "--min-tokens 800 --out part --complete", "Hello")""",
    "after it": "print(0 < len(part), updates[-1][1] == part == _, llm.snapshot().requests)",
    "no variable": "%%llm\nHello {nobody}",
    "no option": "%%llm --tempreature 1\nHello",
    "wrong value": "%%llm --top-p 3\nHello",
    "no prompt": "%%llm\n{empty}",
    "no model": "%%llm --llm nobody\nHello",
    "before too long": "long = 5000 * 'word '",
    "too long": "%%llm --out answer\n{long}",
    "serving": "server = llm.serve(port=0)",
    "ps": """
        tokens = llm.stream("Hello", nbllm.SamplingParams(ignore_eos=True, max_tokens=900))
        first = next(tokens)
        %nbllm ps
        tokens.close()""",
    "close other": "%nbllm close other",
    "close": "%nbllm close llm",
    "closed": "%nbllm ps",
}


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[Any]]:
    """Name of a cell -> its outputs, as they are saved."""
    cells = [nbformat.v4.new_code_cell(dedent(cell).strip("\n")) for cell in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def text(outputs: list[Any]) -> str:
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def test_the_answer_to_a_cell_stays_in_its_output(outputs: dict[str, list[Any]]) -> None:
    (answer,) = outputs["answer"]
    assert answer.output_type == "display_data" and list(answer.data) == ["text/plain"]
    assert "Paris" in text([answer])
    assert text(outputs["kept"]) == f"{text([answer])!r} True\n"


def test_fields_are_variables_of_the_notebook(outputs: dict[str, list[Any]]) -> None:
    assert text(outputs["fields"]).strip() == "42"
    assert outputs["raw"][0].output_type == "display_data"


def test_controls_and_options_decide_how_is_sampled(outputs: dict[str, list[Any]]) -> None:
    (answer,) = outputs["params"]
    assert sorted(answer.data) == ["text/markdown", "text/plain"]


def test_the_answer_is_shown_as_it_grows(outputs: dict[str, list[Any]]) -> None:
    assert text(outputs["steps"]) == "True [False, True] True\n"


def test_an_interrupted_answer_is_kept_as_far_as_it_has_come(outputs: dict[str, list[Any]]) -> None:
    assert outputs["interrupted"][-1].ename == "KeyboardInterrupt"
    assert text(outputs["after it"]) == "True True ()\n"


def test_what_is_wrong_is_said_in_a_line(outputs: dict[str, list[Any]]) -> None:
    for name, problem in {
        "no variable": "there is no variable 'nobody'; write {{ and }} for braces",
        "no option": "unrecognized arguments: --tempreature 1",
        "wrong value": "top_p must be in (0, 1], got 3",
        "no prompt": "the cell has no prompt",
        "no model": "there is no LLM called 'nobody'",
        "close other": "no open model has that name? There are: llm, nbllm-demo",
    }.items():
        shown = "".join(o.get("evalue", "") or o.get("text", "") for o in outputs[name])
        assert problem in shown, (name, outputs[name])
    error = outputs["too long"][-1]
    assert error.ename == "PromptTooLongError"


def test_ps_shows_who_uses_what(outputs: dict[str, list[Any]]) -> None:
    assert text(outputs["none open"]) == "no model is open"
    (table,) = outputs["ps"]
    heading, row, memory = table.data["text/plain"].splitlines()
    assert memory.startswith("this kernel has") and memory.endswith("GiB of main memory")
    assert heading.split("  ")[0] == "name" and row.startswith("llm ")
    assert "nbllm-demo" in row and "cpu float32" in row and "server http://127.0.0.1:" in row
    assert table.data["text/html"].startswith("<table><tr><th>name</th>")
    assert "style" not in table.data["text/html"]


def test_a_closed_model_is_gone(outputs: dict[str, list[Any]]) -> None:
    assert text(outputs["close"]).endswith("closed)")
    assert text(outputs["closed"]) == "no model is open"


def test_fields_follow_the_rules_of_f_strings() -> None:
    variables = {"x": 1.5, "name": "Ada", "row": {"a": [1, 2]}}
    assert fill_in("{x:.2f} {name!r} {row[a]} {{}}", variables) == "1.50 'Ada' [1, 2] {}"
    for template in ("{}", "{0}", "{x.y}", "{", "{x:d}", "{row[0]}", "{1 + 1}"):
        with pytest.raises(InvalidRequestError, match="or give --raw"):
            fill_in(template, variables)
