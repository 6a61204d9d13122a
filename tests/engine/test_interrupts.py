"""Ctrl-C at any line of a call leaves an engine that is idle, whole and usable."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from nbllm import LLM, Interrupted, SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14] * 20]


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that this thread runs in nbllm's code."""

    def __init__(self, at: int) -> None:
        self.remaining = at

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        is_ours = frame.f_globals.get("__name__", "").startswith("nbllm.")
        return self._line if is_ours else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.remaining -= 1
            if self.remaining == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.fixture(scope="module")
def llm(make_checkpoint: Callable[..., Any]) -> Iterator[LLM]:
    folder, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)
    with LLM(folder, skip_tokenizer_init=True, device="cpu", dtype="float32") as llm:
        llm._thread._engine.check_integrity = True
        yield llm


def count_lines(llm: LLM) -> int:
    counter = InterruptAt(1 << 60)
    with counter:
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return (1 << 60) - counter.remaining


def interrupt_often(llm: LLM, num_points: int) -> None:
    expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    num_lines = count_lines(llm)
    rng = random.Random(0)
    hits = 0
    while hits < num_points:
        at = rng.randrange(1, num_lines + 1)
        try:
            with InterruptAt(at):
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        except KeyboardInterrupt as error:
            hits += 1
            if isinstance(error, Interrupted):
                for output, tokens in zip(error.partial, expected, strict=True):
                    assert output is None or output.outputs[0].token_ids == tokens
        metrics = llm.get_metrics()
        assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0, at
        assert metrics["kv_cache_usage_perc"] == 0
        after = llm.generate(PROMPTS[2], PARAMS)[0]
        assert after.outputs[0].token_ids == expected[2]


def test_an_interrupt_at_any_line_ends_the_call_and_nothing_else(llm: LLM) -> None:
    interrupt_often(llm, num_points=60)


@pytest.mark.slow
def test_interrupts_at_five_hundred_points(llm: LLM) -> None:
    interrupt_often(llm, num_points=500)


def test_an_interrupted_call_keeps_the_rows_that_finished(llm: LLM) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)

    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def update(self, count: int = 1) -> None:
            raise KeyboardInterrupt

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    with pytest.raises(Interrupted) as caught:
        llm.generate(PROMPTS[:2], [PARAMS, long], use_tqdm=Bar)
    first, second = caught.value.partial
    assert first.outputs[0].token_ids
    assert second is None


def test_closing_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.get_metrics()["num_requests_running"] == 0
