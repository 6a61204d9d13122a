"""The Stop button of a real kernel ends a cell's call and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from jupyter_client.manager import start_new_kernel

PROMPT = "The future of AI is"
NUM_SHORT = 40

SETUP = f"""
import json, sys
from nbllm import LLM, Interrupted, SamplingParams

llm = LLM(device="cpu", dtype="float32")

def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)

prompts = [f"{{i}} {PROMPT}" for i in range({NUM_SHORT})]
params = [greedy(4 * i + 4) for i in range({NUM_SHORT})]  # they finish one after the other
reference = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

class Bar:
    def __init__(self, **_):
        pass
    def update(self, count):
        print("row", flush=True)
    def close(self):
        pass
"""

# Many steps are left when the last of the short rows ends: the call runs when it is interrupted.
LONG = "outputs = llm.generate(prompts + prompts[:16], params + 16 * [greedy(900)], use_tqdm={bar})"

NEXT = f"""
metrics = llm.get_metrics()
partial = sys.last_value.partial
kept = [output.outputs[0].token_ids if output else None for output in partial[:{NUM_SHORT}]]
after = llm.generate(prompts, params, use_tqdm=False)
print(json.dumps({{
    "idle": metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0,
    "kv_cache_usage": metrics["kv_cache_usage_perc"],
    "num_kept": sum(tokens is not None for tokens in kept),
    "kept_right": all(a in (None, b) for a, b in zip(kept, reference)),
    "right": [output.outputs[0].token_ids for output in after] == reference,
}}))
"""

OnMessage = Callable[[str, Any], None]


class Kernel:
    """Runs cells and listens to what they show."""

    def __init__(self) -> None:
        self.manager, self._client = start_new_kernel(kernel_name="python3")

    def run(self, code: str, on_message: OnMessage | None = None) -> tuple[str, str | None]:
        """What a cell prints, and the name of its error; `on_message` hears all as it comes."""
        cell = self._client.execute(code)
        text, error = "", None
        while True:
            message = self._client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != cell:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind == "error":
                error = content["ename"]
            elif kind == "status" and content["execution_state"] == "idle":
                return text, error
            if on_message is not None:
                on_message(kind, content)

    def result(self, code: str) -> Any:
        """The JSON that a cell prints."""
        text, error = self.run(code)
        assert error is None, text
        return json.loads(text)

    def run_and_interrupt(self, after_rows: int) -> str | None:
        """Interrupt `LONG` when it shows its bar, or once it tells of a number of rows."""
        rows, interrupted = 0, False

        def listen(kind: str, content: Any) -> None:
            nonlocal rows, interrupted
            rows += content["text"].count("row") if kind == "stream" else 0
            is_moment = rows >= after_rows if after_rows else kind == "display_data"
            if is_moment and not interrupted:
                interrupted = True
                self.manager.interrupt_kernel()

        return self.run(LONG.format(bar="Bar" if after_rows else "True"), listen)[1]

    def close(self) -> None:
        self._client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    try:
        assert kernel.run(SETUP)[1] is None
        yield kernel
    finally:
        kernel.close()


def interrupt_and_check(kernel: Kernel, after_rows: int) -> None:
    assert kernel.run_and_interrupt(after_rows) == "Interrupted"
    result = kernel.result(NEXT)
    num_kept = result.pop("num_kept")
    assert num_kept >= after_rows
    assert result == {"idle": True, "kv_cache_usage": 0, "kept_right": True, "right": True}


@pytest.mark.parametrize("after_rows", [0, 1, 17])
def test_the_cell_after_an_interrupted_one_is_right_at_once(
    kernel: Kernel, after_rows: int
) -> None:
    interrupt_and_check(kernel, after_rows)


@pytest.mark.slow
def test_twenty_interrupts_of_one_kernel(kernel: Kernel) -> None:
    rng = random.Random(0)
    for _ in range(20):
        interrupt_and_check(kernel, rng.randrange(NUM_SHORT))


def test_a_server_goes_on_while_a_cell_beside_it_is_interrupted(kernel: Kernel) -> None:
    expected, url, key = kernel.result(f"""
server = llm.serve()
expected = llm.generate({PROMPT!r}, greedy(600))[0].outputs[0].text
print(json.dumps([expected, server.base_url, server.api_key]))
""")
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        stream = client.completions.create(
            model="nbllm-demo",
            prompt=PROMPT,
            temperature=0,
            max_tokens=600,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        first = next(stream)
        assert kernel.run_and_interrupt(after_rows=1) == "Interrupted"
        assert kernel.result("print(llm.get_metrics()['num_requests_running'])") == 1
        text = "".join(chunk.choices[0].text for chunk in [first, *stream] if chunk.choices)
    assert text == expected
    kernel.run("server.stop()")


AWAITING = """
import pandas as pd, threading
frame = pd.DataFrame({'q': prompts})
many = [greedy(900)] * 40

def tell():
    while llm.get_metrics()['num_requests_running'] == 0:
        pass
    print('begun', flush=True)

threading.Thread(target=tell).start()"""


@pytest.mark.parametrize(
    "wait",
    [
        "await llm.agenerate(prompts, many)",
        "await frame.llm.submit('q', sampling_params=many[0])",
    ],
)
def test_an_await_ends_when_it_is_interrupted(kernel: Kernel, wait: str) -> None:
    counted = "print(llm.get_metrics()['generation_tokens'])"
    before = kernel.result(counted)
    begun = False

    def listen(kind: str, content: Any) -> None:
        nonlocal begun
        if kind == "stream" and not begun:
            begun = True
            kernel.manager.interrupt_kernel()

    error = kernel.run(f"{AWAITING}\n{wait}", listen)[1]
    assert error == "CancelledError"
    assert kernel.result(counted) - before < 40 * 900  # at once, not when all was done
