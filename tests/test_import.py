"""`import nbllm` is cheap: it loads nothing heavy, and takes no time to speak of."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "jinja2",
    "huggingface_hub",
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "ipywidgets",
    "anywidget",
    "traitlets",
    "IPython",
    "tqdm",
    "triton",
    "nbllm_kernels",
    "asyncio",
}


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_importing_nbllm_loads_nothing_heavy() -> None:
    code = "import sys, nbllm, json; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(run(code)))
    assert loaded.isdisjoint(HEAVY), loaded & HEAVY


def test_the_leaves_load_nothing_heavy_either() -> None:
    code = (
        "import sys, json\n"
        "from nbllm import SamplingParams, RequestOutput, InvalidRequestError, BeamSearchParams\n"
        "import nbllm.config\n"
        "print(json.dumps(list(sys.modules)))"
    )
    loaded = set(json.loads(run(code)))
    assert loaded.isdisjoint(HEAVY), loaded & HEAVY


def test_an_engine_loads_neither_transformers_nor_sympy() -> None:
    code = (
        "import sys, json, nbllm\n"
        "with nbllm.LLM(device='cpu') as llm:\n"
        "    llm.generate('1 + 1 =', use_tqdm=False)\n"
        "print(json.dumps(list(sys.modules)))"
    )
    assert {"transformers", "sympy"}.isdisjoint(json.loads(run(code)))


def test_the_import_takes_less_than_0_3_seconds() -> None:
    code = "import time; t = time.perf_counter(); import nbllm; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_importing_nbllm_prints_nothing_and_starts_nothing() -> None:
    code = "import threading, nbllm; assert threading.active_count() == 1"
    assert run(code) == ""


def test_every_exported_name_exists_and_is_listed() -> None:
    import nbllm

    assert set(nbllm.__all__) <= set(dir(nbllm))
    for name in nbllm.__all__:
        assert getattr(nbllm, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nbllm.no_such_name


def test_frames_have_their_llm_whatever_is_asked_for_first() -> None:
    run("import nbllm; nbllm.jobs; import pandas; assert pandas.DataFrame({'a': [1]}).llm")
