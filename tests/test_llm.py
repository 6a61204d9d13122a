"""LLM: what users call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import LLM, EngineClosedError, InvalidRequestError, SamplingParams


@pytest.fixture(scope="module")
def llm(make_checkpoint: Callable[..., Any]) -> Iterator[LLM]:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    with LLM(folder, skip_tokenizer_init=True, dtype="float32", device="cpu") as llm:
        llm._thread._engine.check_integrity = True
        yield llm


def test_importing_nbllm_imports_no_torch() -> None:
    code = "import sys, nbllm; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_exported_name_can_be_imported() -> None:
    import nbllm

    for name in nbllm.__all__:
        assert getattr(nbllm, name) is not None


def test_a_bad_row_fails_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with pytest.warns(UserWarning, match="1 of 3 prompts failed"):
        good, bad, also_good = llm.generate([[5, 6], [], [7, 8]], params, use_tqdm=False)
    assert isinstance(bad.error, InvalidRequestError)
    assert bad.outputs[0].finish_reason == "error"
    for output in (good, also_good):
        assert output.error is None
        assert len(output.outputs[0].token_ids) == 4


def test_a_seeded_row_gives_the_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True)
    prompts = [[3 + i, 40 + i, 90] for i in range(8)]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, params)[0]
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_streamed_tokens_add_up_to_the_generated_ones(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    last = list(llm.stream([9, 10, 11], params))[-1]
    assert last.finished
    assert last.outputs[0].token_ids == llm.generate([9, 10, 11], params)[0].outputs[0].token_ids


def test_continuations_of_one_prompt_differ_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    first = [c.token_ids for c in llm.generate([4, 5, 6], params)[0].outputs]
    assert len({tuple(ids) for ids in first}) == 3
    assert first == [c.token_ids for c in llm.generate([4, 5, 6], params)[0].outputs]


def test_a_closed_engine_says_so(make_checkpoint: Callable[..., Any]) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    llm = LLM(folder, skip_tokenizer_init=True, device="cpu")
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate([1, 2, 3])


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="max_model_length"):
        LLM(max_model_length=5)
