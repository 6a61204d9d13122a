"""nbllm.ray: the verbs on a Ray dataset, by workers that own an engine each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import nbllm
import nbllm.ray
from nbllm import LLM, InvalidRequestError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
QUESTIONS = ["What is the capital of France?", "What is 3 + 4?", None, "What is 17 + 25?"]
ENGINE = {"device": "cpu", "dtype": "float32"}


def answers(llm: LLM) -> dict[str | None, str | None]:
    known: dict[str | None, str | None] = {None: None}
    for question in filter(None, QUESTIONS):
        prompt = llm.encode_chat([{"role": "user", "content": question}])
        known[question] = llm.generate(prompt, GREEDY)[0].outputs[0].text
    return known


def test_a_worker_answers_block_after_block_with_one_engine(llm: LLM) -> None:
    worker = nbllm.ray.Worker(ENGINE, "generate", ("q", GREEDY), {"out": "a"})
    engine = worker._llm
    with engine:
        for questions in (QUESTIONS, QUESTIONS[:1], []):
            table = pa.table({"q": pa.array(questions, pa.string())})
            result = worker(table)
            assert result.column_names == ["q", "a", "a_error"]
            assert result["a"].to_pylist() == [answers(llm)[question] for question in questions]
        assert worker._llm is engine


@pytest.mark.parametrize(
    ("options", "parameter"), [({"journal": "faq"}, "journal"), ({"llm": "model"}, "llm")]
)
def test_what_workers_cannot_share_is_refused(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        nbllm.ray.generate(None, "q", GREEDY, **options)
    assert caught.value.parameter == parameter


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'nbllm\[ray\]'"):
        nbllm.ray.generate(None, "q")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A real Ray cluster of this machine."""
    ray = pytest.importorskip("ray", reason="needs nbllm[ray]")
    import ray.data  # noqa: F811

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 300  # both workers are there when the first block comes
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_two_workers_answer_a_dataset(llm: LLM, cluster: Any, tmp_path: Path) -> None:
    def note_worker(row: dict[Any, Any]) -> Any:
        (tmp_path / str(os.getpid())).touch()
        return row["q"]

    rows = [{"id": number, "q": QUESTIONS[number % 4]} for number in range(64)]
    dataset = cluster.data.from_items(rows, override_num_blocks=16)
    arguments = {"llm": ENGINE, "num_workers": 2, "batch_size": 4}
    result = nbllm.ray.generate(dataset, "q", GREEDY, out="a", **arguments).take_all()
    known = answers(llm)
    assert sorted(row["id"] for row in result) == list(range(64))
    assert all(row["a"] == known[row["q"]] and row["a_error"] is None for row in result)
    embedded = nbllm.ray.embed(dataset, note_worker, dimensions=8, na="skip", **arguments)
    table = pa.concat_tables(cluster.get(embedded.to_arrow_refs()))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    assert len(table) == 64
    workers = {int(path.name) for path in tmp_path.iterdir()}
    assert len(workers) == 2 and os.getpid() not in workers


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_a_worker_refuses_is_raised_where_the_dataset_is_read(cluster: Any) -> None:
    dataset = cluster.data.from_items([{"q": "x"}])
    with pytest.raises(Exception, match="no column 'text'"):
        nbllm.ray.generate(dataset, "{text}", GREEDY, llm=ENGINE).take_all()
