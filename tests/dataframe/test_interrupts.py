"""Ctrl-C in a DataFrame's call: it is raised once, and never lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest

import nbllm
from nbllm import LLM, Interrupted, SamplingParams
from nbllm.dataframe.interrupts import OneInterrupt

GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C has its usual effect, also where a shell started the tests in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_no_other_one_is_raised_while_the_first_is_on_its_way_out() -> None:
    reached = []

    def be_interrupted() -> None:
        try:
            press()
        finally:
            press()
            try:
                raise ValueError
            except ValueError:
                press()
            reached.append("the end of the block")

    with pytest.raises(KeyboardInterrupt), OneInterrupt():
        be_interrupted()
    assert reached


def test_after_one_that_was_swallowed_the_next_is_raised() -> None:
    with OneInterrupt():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                press()


def test_one_that_is_held_is_raised_at_the_release() -> None:
    with OneInterrupt() as interrupts:
        interrupts.hold()
        press()
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
        interrupts.hold()
        interrupts.release()


def test_one_that_is_held_after_another_was_swallowed_is_raised_too() -> None:
    with OneInterrupt() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            press()
        interrupts.hold()
        press()
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()


def test_a_handler_that_raises_nothing_is_called_each_time() -> None:
    calls = []
    signal.signal(signal.SIGINT, lambda *_: calls.append(True))  # ipykernel's, in a cell with await
    with OneInterrupt():
        press()
        press()
    assert len(calls) == 2


def test_a_call_ends_although_its_progress_bar_has_swallowed_the_first(llm: LLM) -> None:
    swallowed = []

    class Deaf:
        def __init__(self, **_: Any) -> None: ...

        def update(self, count: int = 1) -> None:
            try:
                press()
            except KeyboardInterrupt:
                if swallowed:
                    raise
                swallowed.append(True)

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    frame = pd.DataFrame({"q": ["one", "two", "three"]})
    with pytest.raises(Interrupted) as caught:
        frame.llm.generate("q", sampling_params=GREEDY, use_tqdm=Deaf)
    assert nbllm.last is caught.value.partial
    assert swallowed
