"""`LLM.embed`: the vectors of transformers, in every form of call."""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import nbllm
from nbllm import (
    LLM,
    EmbeddingRequestOutput,
    EngineClosedError,
    Interrupted,
    InvalidRequestError,
    PoolingParams,
    PromptTooLongError,
    SamplingParams,
)

TOLERANCE = 1e-4
SHORT, LONG = "The capital of France is", "The soup was cold, and the waiter knew. " * 60
RAW = {pooling: PoolingParams(pooling=pooling, normalize=False) for pooling in ("last", "mean")}
TINY: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "block_size": 8}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3", "Qwen3", {"head_dim": 16}),
    (
        "llama-dynamic",
        "Llama",
        {
            "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    ),
    ("mistral-window", "Mistral", {"head_dim": 16, "sliding_window": 24}),
    ("gemma3", "Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}),
    ("olmo2", "Olmo2", {}),
    ("opt", "OPT", {"ffn_dim": 128, "word_embed_proj_dim": 32}),
    ("gpt2", "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128}),
]


def reference(model: Any, ids: list[int], params: PoolingParams) -> np.ndarray:
    """What transformers makes of a prompt."""
    with torch.inference_mode():
        model(torch.tensor([[0]]), use_cache=False)  # a short text resets "dynamic" rope
        states = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    vector = states.mean(0) if params.pooling == "mean" else states[-1]
    vector = vector[: params.dimensions]
    if params.normalize is not False:
        vector = torch.nn.functional.normalize(vector, dim=0)
    return vector.numpy()


def check(output: EmbeddingRequestOutput, model: Any, params: PoolingParams) -> None:
    assert output.finished and output.error is None
    expected = reference(model, output.prompt_token_ids, params)
    vector = output.outputs.embedding
    assert isinstance(vector, list) and output.outputs.hidden_size == len(expected)
    assert np.abs(np.array(vector) - expected).max() < TOLERANCE


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_num_batched_tokens=128) as llm:
        llm._thread._engine.check_integrity = True
        yield llm
        metrics = llm.get_metrics()
        assert metrics["kv_cache_usage_perc"] == metrics["num_requests_running"] == 0


@pytest.fixture(scope="module")
def demo() -> Any:
    """The bundled model in transformers."""
    import transformers

    folder = Path(nbllm.__file__).parent / "demo"
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "prefix", "config"), CASES, ids=[case[0] for case in CASES])
def test_embeddings_are_those_of_transformers(
    make_checkpoint: Callable[..., Any],
    device: str,
    name: str,
    prefix: str,
    config: dict[str, Any],
) -> None:
    folder, model = make_checkpoint(prefix, **config)
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 500) for _ in range(n)] for n in (1, 2, 7, 8, 30, 100, 150)]
    with LLM(folder, device=device, max_num_batched_tokens=64, **TINY) as llm:
        for params in RAW.values():
            for output in llm.embed(prompts, pooling_params=params, use_tqdm=False):
                check(output, model.base_model, params)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_texts_of_any_length_are_embedded(llm: LLM, demo: Any, pooling: str) -> None:
    params = PoolingParams(pooling=pooling)
    for _ in range(2):  # from the prefix cache the second time
        short, long = llm.embed([SHORT, LONG], pooling_params=params)
        assert long.num_cached_tokens == 0 or pooling == "last"
        check(short, demo, params)
        check(long, demo, params)
        assert len(long.prompt_token_ids) > 5 * 128
        assert short.prompt == SHORT and short.request_id != long.request_id
    assert (long.num_cached_tokens > 0) == (pooling == "last")
    assert math.isclose(math.hypot(*long.outputs.embedding), 1.0, abs_tol=1e-6)


def test_a_prompt_may_have_every_form_that_generate_takes(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(SHORT)
    expected = llm.embed(SHORT)[0].outputs.embedding
    forms: list[Any] = [
        SHORT,
        ids,
        {"prompt": SHORT},
        {"prompt_token_ids": ids},
        np.array(ids).tolist(),
        (SHORT, ids),
        pd.Series([SHORT]),
        llm.embed(SHORT)[0].prompt_token_ids,
    ]
    for form in forms:
        for output in llm.embed(form):
            assert output.prompt_token_ids == ids
            assert np.allclose(output.outputs.embedding, expected, atol=1e-6)
    assert llm.embed([]) == []
    assert [number for number, _ in llm.embed_iter(iter([SHORT]))] == [0]


def test_a_wrong_row_fails_alone(llm: LLM) -> None:
    rows: list[Any] = [SHORT, "", [10**9], None, "word " * 3000]
    with pytest.warns(UserWarning, match="4 of 5 prompts failed") as caught:
        fine, *failed = llm.embed(rows, use_tqdm=False)
    assert caught[0].filename == __file__
    assert fine.error is None and fine.outputs.embedding
    assert all(isinstance(output.error, InvalidRequestError) for output in failed)
    assert isinstance(failed[-1].error, PromptTooLongError)
    assert all(output.finished and not output.outputs.embedding for output in failed)
    for row in rows[1:]:
        with pytest.raises((InvalidRequestError, TypeError)):
            llm.embed(row)


def test_each_prompt_may_have_its_own_parameters(llm: LLM, demo: Any) -> None:
    params = [
        PoolingParams(),
        PoolingParams(pooling="mean", dimensions=16),
        PoolingParams(normalize=False, dimensions=3),
        PoolingParams(use_activation=False),
    ]
    outputs = llm.embed([SHORT] * 4, pooling_params=params, use_tqdm=False)
    for output, own in zip(outputs, params, strict=True):
        check(output, demo, own)
    assert [output.outputs.hidden_size for output in outputs[1:3]] == [16, 3]
    assert params[3].normalize is False


@pytest.mark.parametrize(
    ("values", "parameter"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"pooling": ["mean"]}, "pooling"),
        ({"normalize": "no"}, "normalize"),
        ({"use_activation": 1}, "use_activation"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(values: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PoolingParams(**values)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"pooling_params": PoolingParams(dimensions=10**6)}, "dimensions"),
        ({"pooling_params": PoolingParams(pooling="cls")}, "pooling"),
        ({"pooling_params": SamplingParams()}, "pooling_params"),
        ({"pooling_params": [PoolingParams()] * 2}, "pooling_params"),
        ({"priority": [1, 2]}, "priority"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    llm: LLM, options: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.embed(SHORT, **options)
    assert caught.value.parameter == parameter


def test_a_prompt_may_fill_the_context_and_a_longer_one_may_be_cut(llm: LLM, demo: Any) -> None:
    size = llm.config.max_model_len
    assert size is not None
    ids = [2 + number % 400 for number in range(size + 1)]
    params = PoolingParams()
    check(llm.embed(ids[:size])[0], demo, params)
    with pytest.raises(PromptTooLongError, match=f"{size + 1} tokens"):
        llm.embed(ids)
    for keep, kept in ((-1, ids[1:]), (5, ids[-5:])):
        (cut,) = llm.embed(ids, truncate_prompt_tokens=keep)
        assert cut.prompt_token_ids == kept
        check(cut, demo, params)
    whole, cut = llm.embed([SHORT, LONG], truncate_prompt_tokens=100)
    assert (whole.prompt, cut.prompt) == (SHORT, None)
    assert cut.prompt_token_ids == llm.get_tokenizer().encode(LONG)[-100:]


def test_texts_that_are_generated_beside_embeddings_stay_the_same(llm: LLM, demo: Any) -> None:
    prompts = [f"{number}. {text}" for number in range(6) for text in (SHORT, LONG[:400])]
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=24, ignore_eos=True)
    alone = [o.outputs[0].token_ids for o in llm.generate(prompts, sampling, use_tqdm=False)]
    llm.reset_prefix_cache()

    async def both() -> tuple[list[Any], ...]:
        return await asyncio.gather(
            llm.agenerate(prompts, sampling),
            llm.aembed(prompts, pooling_params=RAW["mean"]),
            llm.aembed(prompts),
        )

    generated, means, lasts = asyncio.run(both())
    assert [output.outputs[0].token_ids for output in generated] == alone
    for mean, last in zip(means, lasts, strict=True):
        check(mean, demo, RAW["mean"])
        check(last, demo, PoolingParams())


def test_an_embedding_draws_no_seed(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    def texts(*, embeds: bool) -> list[list[int]]:
        with LLM(device="cpu", dtype="float32", seed=5) as fresh:
            got = []
            for _ in range(2):
                got.append(fresh.generate(SHORT, params)[0].outputs[0].token_ids)
                if embeds:
                    fresh.embed(SHORT)
            return got

    assert texts(embeds=True) == texts(embeds=False)


def test_cancelling_a_task_ends_its_embeddings(llm: LLM) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(llm.aembed([LONG] * 300, pooling_params=RAW["mean"]))
        while not llm.get_metrics()["num_requests_running"]:
            assert not task.done()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_cache_usage_perc"] == 0


def test_an_interrupt_keeps_the_vectors_that_were_done(llm: LLM, demo: Any) -> None:
    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def update(self, count: int = 1) -> None:
            raise KeyboardInterrupt

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    with pytest.raises(Interrupted) as caught:
        llm.embed([SHORT, *[LONG] * 20], use_tqdm=Bar)
    first, *others = caught.value.partial
    check(first, demo, PoolingParams())
    assert None in others
    assert llm.get_metrics()["num_requests_running"] == 0


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_decoder_made_for_embeddings_says_how(
    make_checkpoint: Callable[..., Any], tmp_path: Path, has_folder: bool
) -> None:
    checkpoint, model = make_checkpoint("Qwen3", head_dim=16)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    kinds = ("Transformer", "Pooling")
    modules = [{"path": kind, "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    if has_folder:  # some have the list only
        (folder / "Pooling").mkdir()
        (folder / "Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    pooling = "mean" if has_folder else "last"
    with LLM(folder, device="cpu", **TINY) as llm:
        assert llm.get_default_pooling_params() == RAW[pooling]
        for params in (None, PoolingParams(dimensions=8), PoolingParams(normalize=True)):
            (output,) = llm.embed([5, 6, 7], pooling_params=params)
            wanted = (params or RAW[pooling]).or_default(RAW[pooling])
            check(output, model.base_model, wanted)


def test_a_closed_llm_embeds_no_more(make_checkpoint: Callable[..., Any]) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16)
    llm = LLM(folder, device="cpu", **TINY)
    iterator = llm.embed_iter([[5, 6, 7]] * 400)
    next(iterator)
    llm.close()
    errors = {type(output.error) for _, output in iterator}
    assert errors <= {EngineClosedError, type(None)}
    with pytest.raises(EngineClosedError):
        llm.embed([5, 6, 7])


def test_batch_invariant_vectors_are_the_same_bit_for_bit(
    make_checkpoint: Callable[..., Any], device: str
) -> None:
    folder, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2)
    rng = random.Random(4)
    needle = [rng.randrange(2, 500) for _ in range(45)]
    variants: list[dict[str, Any]] = [
        {},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 14, "max_model_len": 96},
    ]
    for params in RAW.values():
        found = set()
        for variant in variants:
            with LLM(folder, device=device, batch_invariant=True, **TINY, **variant) as llm:
                for size in (0, 9):
                    rows = [[*needle[: rng.randrange(1, 40)], 3] for _ in range(size)]
                    rows.insert(rng.randrange(size + 1), needle)
                    outputs = llm.embed(rows, pooling_params=params, use_tqdm=False)
                    vector = outputs[rows.index(needle)].outputs.embedding
                    found.add(tuple(vector))
        assert len(found) == 1
