"""What is told of a job while it runs beside the cell, and what stays: in a real kernel."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from nbllm import LLM, Interrupted, SamplingParams
from nbllm.sampling_params import StructuredOutputsParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)

CELLS = [
    """
    import pandas as pd
    import nbllm
    from nbllm import SamplingParams

    llm = nbllm.LLM(device="cpu", dtype="float32")
    questions = [f"What is {i} + 1?" for i in range(8)] + ["word " * 4000]
    frame = pd.DataFrame({"q": questions})
    params = SamplingParams(temperature=0, max_tokens=4)
    job = frame.llm.submit("q", params)
    job""",
    "result = job.result()",
    "job",
    "awaited = await frame.head(2).llm.agenerate('q', params, llm=llm)",
    "llm.close()",
]


@pytest.fixture(scope="module")
def outputs() -> list[list[Any]]:
    cells = [nbformat.v4.new_code_cell(dedent(cell)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [list(cell.outputs) for cell in notebook.cells]


def test_every_cell_that_shows_a_job_is_saved_with_its_summary(outputs: list[list[Any]]) -> None:
    for (shown,) in (outputs[0], outputs[2]):
        line, first, *others = shown.data["text/plain"].splitlines()
        assert line.startswith("done: 9 of 9 rows, ") and "1 failed" in line
        assert "prefix hits" in line and "first token p50" in line
        assert first.startswith("8  failed  ") and len(others) == 4
        assert all("  done  " in other for other in others)
        page = shown.data["text/html"]
        assert "<table>" in page and "<progress" not in page and "style" not in page


def test_nothing_is_printed_into_the_cells(outputs: list[list[Any]]) -> None:
    assert outputs[1] == outputs[4] == []


def test_a_running_job_shows_the_kv_cache_and_a_bar(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 1 + 1?"] * 2})
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    job = frame.llm.submit("q", params, use_tqdm=False, dedupe=False)
    page = job._repr_html_()
    job.cancel()
    assert page.startswith("<progress ") and "KV cache " in page
    with pytest.raises(Interrupted):
        job.result(timeout=60)
    assert "<progress" not in job._repr_html_() and "KV cache" not in job._repr_html_()


def test_a_call_that_is_awaited_shows_its_progress(outputs: list[list[Any]]) -> None:
    (shown,) = outputs[3]
    assert shown.data["text/plain"].startswith("Generating: 2/2 rows, ")


def test_a_job_counts_what_it_did(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["What is 1 + 1?", "What is 1 + 1?", "word " * 4000]})
    before = llm.get_metrics()
    job = frame.llm.submit("q", GREEDY, use_tqdm=False)
    job.result()
    stats, after = job.stats, llm.get_metrics()
    assert (stats.num_rows, stats.num_done, stats.num_failed, stats.num_twins) == (3, 3, 1, 1)
    assert stats.num_tokens == after["generation_tokens"] - before["generation_tokens"]
    assert stats.num_cached_tokens == after["prefix_cache_hits"] - before["prefix_cache_hits"]
    assert stats.num_prompt_tokens > 0
    assert stats.first_token_p50_s is not None and 0 < stats.first_token_p50_s <= stats.seconds
    assert job.stats == stats


def test_the_gauge_is_the_engines_own_number(llm: LLM) -> None:
    seen: list[tuple[float, float]] = []

    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def update(self, count: int) -> None:
            seen.append(llm._thread.call(usages))

        def close(self) -> None: ...

    def usages(engine: Any) -> tuple[float, float]:
        return llm.kv_cache_usage, engine.metrics()["kv_cache_usage_perc"]

    frame = pd.DataFrame({"q": ["One?", "Two?"]})
    lengths = [8, 200]
    params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=0) for n in lengths]
    frame.llm.generate("q", params, use_tqdm=Bar)
    assert seen and all(ours == pytest.approx(engines) for ours, engines in seen)
    assert max(ours for ours, _ in seen) > 0


def test_a_result_is_no_html(llm: LLM) -> None:
    frame = pd.DataFrame({"q": ["{missing} <b>"]})
    only = GREEDY.clone(structured_outputs=StructuredOutputsParams(choice=["<b>"]))
    job = frame.llm.submit("q", only, use_tqdm=False)
    job.result()
    assert "<td>&lt;b&gt;</td>" in job._repr_html_() and "<b>" not in job._repr_html_()
