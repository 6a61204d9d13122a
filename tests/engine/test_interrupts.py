"""Ctrl-C anywhere in a call leaves an engine that is idle, whole and usable.

It surfaces as `Interrupted`, with every row that was finished by then.
"""

from __future__ import annotations

import inspect
import linecache
import random
import sys
from collections.abc import Callable, Iterator
from itertools import count
from threading import Thread
from types import FrameType
from typing import Any

import pytest

from nbllm import LLM, EmbeddingRequestOutput, Interrupted, SamplingParams
from nbllm.engine.engine_thread import EngineThread
from nbllm.engine.request import Request
from nbllm.engine.request_stream import RequestStream

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
NUM_LINES_BEFORE_TRY = 2  # of `generate` and `embed`, with the line of the `try` itself
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14] * 20]


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th place that this thread reaches.

    Places are the lines and the ends of functions, of nbllm and of what it waits with.
    """

    def __init__(self, at: int) -> None:
        self.remaining = at
        self.finished: list[bool] = []  # which of the submitted requests were, at that moment
        self._submitted: list[Request] = []

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        module = frame.f_globals.get("__name__", "")
        is_ours = module.startswith(("nbllm.", "threading", "queue", "concurrent."))
        return self._place if is_ours else None

    def _place(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        is_end = event == "return" and (
            code in (LLM.generate.__code__, LLM.embed.__code__)  # too late
            or code.co_flags & inspect.CO_GENERATOR  # might be its deletion, which raises nothing
        )
        # A `with` has a line event on its way out too, before `__exit__`; interrupts come after it.
        is_with = linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        if event in ("line", "return") and not is_end and not is_with:
            self.remaining -= 1
            if code is EngineThread.submit.__code__:
                self._submitted = frame.f_locals["requests"]
            if self.remaining == 0:
                sys.settrace(None)
                self.finished = [request.is_finished for request in self._submitted]
                raise KeyboardInterrupt
        return self._place


@pytest.fixture(scope="module")
def llm(make_checkpoint: Callable[..., Any]) -> Iterator[LLM]:
    folder, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)
    with LLM(folder, skip_tokenizer_init=True, device="cpu", dtype="float32") as llm:
        llm._thread._engine.check_integrity = True
        yield llm


def generate(llm: LLM) -> list[Any]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def embed(llm: LLM) -> list[Any]:
    return llm.embed(PROMPTS, use_tqdm=False)


def result(output: Any) -> Any:
    """What a row is to have whatever happens to the call."""
    if isinstance(output, EmbeddingRequestOutput):
        return output.outputs.embedding
    return output.outputs[0].token_ids


def count_places(llm: LLM, call: Callable[[LLM], list[Any]]) -> int:
    counter = InterruptAt(1 << 60)
    with counter:
        call(llm)
    return (1 << 60) - counter.remaining


def interrupt_often(llm: LLM, call: Callable[[LLM], list[Any]], num_points: int) -> None:
    expected = [pytest.approx(result(output), abs=1e-5) for output in call(llm)]
    num_places = count_places(llm, call)
    rng = random.Random(0)
    hits = 0
    while hits < num_points:
        at = rng.randrange(NUM_LINES_BEFORE_TRY + 1, num_places + 1)
        interrupt = InterruptAt(at)
        try:
            with interrupt:
                call(llm)
        except Interrupted as error:
            hits += 1
            partial = error.partial or [None] * len(PROMPTS)
            for output, whole in zip(partial, expected, strict=True):
                assert output is None or result(output) == whole
            for output, finished in zip(partial, interrupt.finished, strict=False):
                assert output is not None or not finished, at
        metrics = llm.get_metrics()
        assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0, at
        assert metrics["kv_cache_usage_perc"] == 0
        assert result(call(llm)[2]) == expected[2]


@pytest.mark.parametrize(("call", "num_points"), [(generate, 60), (embed, 30)])
def test_an_interrupt_at_any_place_ends_the_call_and_nothing_else(
    llm: LLM, call: Callable[[LLM], list[Any]], num_points: int
) -> None:
    interrupt_often(llm, call, num_points)


@pytest.mark.slow
@pytest.mark.parametrize("call", [generate, embed])
def test_interrupts_at_five_hundred_points(llm: LLM, call: Callable[[LLM], list[Any]]) -> None:
    interrupt_often(llm, call, num_points=500)


def test_an_interrupt_anywhere_in_the_wait_leaves_no_lock_that_the_engine_needs(
    make_request: Callable[..., Request],
) -> None:
    request = make_request([1, 2, 3])
    for at in count(1):
        stream = RequestStream()
        stream.put([request])
        interrupt = InterruptAt(at)
        try:
            with interrupt:
                stream.take()
        except KeyboardInterrupt:
            pass
        engine = Thread(target=stream.put, args=([request],), daemon=True)
        engine.start()
        engine.join(10)
        assert not engine.is_alive(), at
        if interrupt.remaining > 0:
            break


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


def test_rows_that_finished_on_their_way_to_an_interrupted_reader_are_kept(llm: LLM) -> None:
    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def update(self, count: int = 1) -> None:
            finished = llm._thread.call(lambda engine: not engine.has_requests)
            if finished:  # while the reader was busy with the first row
                raise KeyboardInterrupt
            self.update()

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    wrong: Any = [10**9]
    prompts = [*PROMPTS, wrong]
    with pytest.raises(Interrupted) as caught:
        llm.generate(prompts, PARAMS, use_tqdm=Bar)
    whole = [llm.generate(prompt, PARAMS)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert [o.outputs[0].token_ids for o in caught.value.partial[:-1]] == whole
    assert caught.value.partial[-1].error is not None


def test_closing_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.get_metrics()["num_requests_running"] == 0
