"""What the tests of frames share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbllm import LLM, set_default_llm


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The demo model, which the accessors find by themselves."""
    with LLM(device="cpu", dtype="float32") as llm:
        set_default_llm(llm)
        yield llm
        set_default_llm(None)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for jobs, in place of the user's."""
    monkeypatch.setenv("NBLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
