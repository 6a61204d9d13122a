"""The documents: their code compiles, their links lead somewhere, their tables are true."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import textwrap
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import nbllm
from nbllm import LLM, SamplingParams
from nbllm.config import EngineConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FROM_VLLM = (DOCS / "coming_from_vllm.md").read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


def section(title: str) -> str:
    """The text under a heading of coming_from_vllm.md."""
    return FROM_VLLM.split(f"\n## {title}\n")[1].split("\n## ")[0]


def names(text: str) -> set[str]:
    """Words that stand alone in backticks."""
    return set(re.findall(r"`(\w+)`", text))


def python_blocks(text: str) -> list[str]:
    """Fenced blocks of Python, and indented ones that are no commands of a shell."""
    fenced = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^    .*\n|^\n(?=    ))+", plain, re.MULTILINE)
    shell = ("python", "nbllm", "pip")
    texts = [textwrap.dedent(block).strip() for block in indented]
    return [*fenced, *(text for text in texts if text and not text.startswith(shell))]


@each_page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "http://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@each_page
def test_every_block_of_python_compiles(page: Path) -> None:
    for block in python_blocks(page.read_text(encoding="utf-8")):
        compile(block, page.name, "exec")


def test_the_tour_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBLLM_HOME", str(tmp_path))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = readme.split("\n## Tour\n")[1].split("\n## ")[0]
    cells = [nbformat.v4.new_code_cell(block) for block in python_blocks(tour)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


def test_the_blocks_are_found() -> None:
    assert len(python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))) >= 5
    assert len(python_blocks(FROM_VLLM)) == 1
    assert python_blocks("Text:\n\n    a = 1\n\n    b = 2\n\nMore.\n") == ["a = 1\n\nb = 2"]


def test_what_is_the_same_as_in_vllm_is_there() -> None:
    options = {field.name for field in dataclasses.fields(EngineConfig)}
    (constructor,) = [line for line in section("The same").splitlines() if "`LLM(model" in line]
    assert names(constructor) - options <= {
        "tokenizer",
        "revision",
        "hf_token",
        "download_dir",
        "load_format",
        "chat_template",
        "skip_tokenizer_init",
    }
    assert len(names(constructor) & options) == 15
    for name in ("StructuredOutputsParams", "RequestOutput", "Logprob", "TextPrompt"):
        assert name in names(section("The same")) and hasattr(nbllm, name)
    for name in re.findall(r"`(?:llm\.)?(\w+)\(\)`", section("The same")):
        assert hasattr(LLM, name), name


def test_what_differs_from_vllm_is_so() -> None:
    assert SamplingParams().max_tokens is None
    assert EngineConfig().gpu_memory_utilization == 0.9
    for name in ("stream", "astream", "agenerate", "serve", "generate_iter"):
        assert hasattr(LLM, name)


def test_what_is_added_is_there() -> None:
    for name in re.findall(r"`nbllm\.(\w+)`", section("Added")):
        assert getattr(nbllm, name) is not None
    (frames,) = [line for line in section("Added").splitlines() if "df.llm" in line]
    verbs = re.findall(r"`(?:df\.llm\.)?(\w+)`", frames)
    assert len(verbs) == 7
    for verb in verbs:
        assert hasattr(pd.DataFrame().llm, verb), verb


def test_what_is_missing_is_refused() -> None:
    options = names(section("Missing")) - {"tensor_parallel_size", "lora_request", "df"}
    options -= {"classify", "encode", "reward", "TypeError", "ModelLoadError"}
    assert len(options) >= 11
    for option in options:
        with pytest.raises(TypeError, match=option):
            LLM(device="cpu", **{option: True})
    with pytest.raises(nbllm.InvalidRequestError, match="tensor_parallel_size"):
        LLM(device="cpu", tensor_parallel_size=2)
    for method in ("score", "classify", "encode", "reward"):
        assert not hasattr(LLM, method)


@pytest.mark.slow
def test_the_api_reference_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("build_api", DOCS / "build_api.py")
    assert spec is not None and spec.loader is not None
    build_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_api)
    build_api.build(tmp_path)
    page = (tmp_path / "nbllm.html").read_text(encoding="utf-8")
    for name in nbllm.__all__:
        assert f'id="{name}"' in page, name
    accessor = (tmp_path / "nbllm" / "dataframe" / "accessor.html").read_text(encoding="utf-8")
    assert 'id="DataFrameAccessor.generate"' in accessor


def test_every_test_that_the_readme_names_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)::(test_\w+)`", readme)
    assert len(named) > 20
    for file, test in named:
        texts = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob(f"{file}.py")]
        assert any(re.search(rf"^(async )?def {test}\(", text, re.MULTILINE) for text in texts), (
            test
        )
