"""What the tests of frames share."""

from __future__ import annotations

import _thread
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


class InterruptingBar:
    """A progress bar behind which the user presses Ctrl-C after the first row."""

    def __init__(self, **_: Any) -> None: ...

    def update(self, count: int = 1) -> None:
        _thread.interrupt_main()

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def interrupting_bar() -> Iterator[type[InterruptingBar]]:
    """Such a bar, for `use_tqdm`; Ctrl-C has its usual effect, also where a shell started the tests
    in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield InterruptingBar
    signal.signal(signal.SIGINT, previous)
