"""Encoders embed as transformers does, and say what they can't do."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from nbllm import (
    LLM,
    InvalidRequestError,
    ModelLoadError,
    PoolingParams,
    PromptTooLongError,
    RequestFailedError,
)
from nbllm.config import ModelConfig
from nbllm.models.encoder import AttentionPlan

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 300,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODERN = {"local_attention": 16, "num_hidden_layers": 4}
# One line each: class in transformers, what it adds to the configuration.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("BertModel", {"type_vocab_size": 3}),
    ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
    ("RobertaForMaskedLM", {"hidden_act": "relu"}),
    ("XLMRobertaModel", {"pad_token_id": 3}),
    ("XLMRobertaForMaskedLM", {}),
    ("ModernBertModel", MODERN),
    ("ModernBertForMaskedLM", MODERN | {"norm_bias": True, "attention_bias": True}),
    ("ModernBertModel", MODERN | {"mlp_bias": True, "layer_types": ["sliding_attention"] * 4}),
]
POOLINGS = ("cls", "mean", "last")
RAW = {pooling: PoolingParams(pooling=pooling, normalize=False) for pooling in POOLINGS}
LENS = (1, 2, 7, 8, 9, 30, 100, 50, 31, 296, 150)
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
IDS: dict[str, Any] = OPTIONS | {"skip_tokenizer_init": True}

MakeEncoder = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEncoder]:
    """(folder, transformers model without its head) of a class with random float32 weights."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str, **overrides: Any) -> tuple[Path, Any]:
        key = f"{name}-{sorted(overrides.items())}"
        if key not in made:
            torch.manual_seed(0)
            model_class = getattr(transformers, name)
            model = model_class(model_class.config_class(**(SHAPE | overrides))).eval().float()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            if not made:
                gc.collect()
                gc.freeze()  # transformers: a million objects that every collection would walk
            made[key] = folder, model.base_model
        return made[key]

    yield make
    gc.unfreeze()


@pytest.fixture(scope="module")
def bert(make_encoder: MakeEncoder) -> Any:
    return make_encoder("BertModel")


@pytest.fixture
def copy(bert: Any, tmp_path: Path) -> Path:
    """A folder to change."""
    shutil.copytree(bert[0], tmp_path / "model")
    return tmp_path / "model"


def random_prompts(lens: Any = LENS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 512) for _ in range(n)] for n in lens]


@torch.inference_mode()
def hidden_states(model: Any, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).last_hidden_state[0].numpy()


def pool(states: np.ndarray, pooling: str) -> np.ndarray:
    return {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]


def reference(model: Any, ids: list[int], pooling: str = "cls") -> np.ndarray:
    return pool(hidden_states(model, ids), pooling)


def distance(vector: Any, expected: Any) -> float:
    assert np.shape(vector) == np.shape(expected)
    return float(np.abs(np.asarray(vector) - np.asarray(expected)).max())


@pytest.mark.parametrize(("name", "config"), CASES)
def test_hidden_states_and_embeddings_are_those_of_transformers(
    make_encoder: MakeEncoder, device: str, name: str, config: dict[str, Any]
) -> None:
    folder, model = make_encoder(name, **config)
    prompts = random_prompts()
    expected = [hidden_states(model, ids) for ids in prompts]
    tolerance = 1e-5 if device == "cpu" else 1e-4
    with LLM(folder, max_num_batched_tokens=320, **IDS | {"device": device}) as llm:
        llm._thread._engine.check_integrity = True
        for pooling, params in RAW.items():
            outputs = llm.embed(prompts, pooling_params=params, use_tqdm=False)
            assert [output.prompt_token_ids for output in outputs] == prompts
            for output, states in zip(outputs, expected, strict=True):
                assert distance(output.outputs.embedding, pool(states, pooling)) < tolerance
        metrics = llm.get_metrics()
        assert 3 <= metrics["num_steps"] < 3 * len(prompts)  # several at a time
        assert metrics["num_requests_running"] == metrics["kv_cache_usage_perc"] == 0

        def run_model(engine: Any) -> np.ndarray:
            ids = torch.tensor([i for prompt in prompts for i in prompt], device=device)
            positions = torch.cat([torch.arange(n) for n in LENS]).to(device)
            with torch.inference_mode():
                return engine.runner.model(ids, positions, LENS).cpu().numpy()

        found = np.split(llm._thread.call(run_model), np.cumsum(LENS)[:-1])
        assert max(map(distance, found, expected)) < tolerance


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_a_vector_does_not_depend_on_its_neighbours(make_encoder: MakeEncoder, name: str) -> None:
    folder, model = make_encoder(name, **(MODERN if name == "ModernBertModel" else {}))
    rng = random.Random(1)
    prompts = random_prompts([rng.randrange(1, 60) for _ in range(150)], seed=2)
    with LLM(folder, **IDS) as llm:
        together = llm.embed(prompts, use_tqdm=False)
        for number in rng.sample(range(150), 12):
            alone = llm.embed(prompts[number])[0].outputs.embedding
            assert distance(together[number].outputs.embedding, alone) < 1e-6
            expected = reference(model, prompts[number])
            assert distance(alone, expected / np.linalg.norm(expected)) < 1e-5
    needle, vectors = prompts[0], set()
    with LLM(folder, batch_invariant=True, **IDS) as llm:
        for size in (0, 5, 40):
            outputs = llm.embed([*prompts[1 : size + 1], needle], use_tqdm=False)
            vectors.add(tuple(outputs[-1].outputs.embedding))
    assert len(vectors) == 1  # bit for bit


@pytest.mark.parametrize("window", [None, 1, 8, 64])
def test_texts_are_attended_to_as_with_one_mask_for_all(window: int | None) -> None:
    lens = (1, 2, 3, 70, 49, 48, 200, 9, 10, 65)
    num_tokens = sum(lens)
    q, k, v = torch.randn(3, num_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    text = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    sees = text[:, None] == text
    if window is not None:
        sees &= (torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)).abs() <= window
    scores = torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5
    expected = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v.transpose(0, 1)
    for batch_invariant in (False, True):
        plan = AttentionPlan(lens, q.device, window=window, batch_invariant=batch_invariant)
        found = plan.attend(q, k, v)
        assert (found - expected.transpose(0, 1).flatten(1)).abs().max() < 1e-5


def renamed(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("BertModel", "bert."), ("XLMRobertaModel", "roberta."), ("ModernBertModel", "model.")],
)
def test_names_with_and_without_the_prefix_are_read(
    make_encoder: MakeEncoder, tmp_path: Path, name: str, prefix: str
) -> None:
    folder, model = make_encoder(name)
    assert not any(key.startswith(prefix) for key in load_file(folder / "model.safetensors"))
    shutil.copytree(folder, tmp_path / "model")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {prefix + key: tensor for key, tensor in tensors.items()}

    with LLM(renamed(tmp_path / "model", change), **IDS) as llm:
        (output,) = llm.embed([5, 6, 7], pooling_params=RAW["mean"])
    assert distance(output.outputs.embedding, reference(model, [5, 6, 7], "mean")) < 1e-5


def test_names_and_buffers_of_the_first_checkpoints_are_read(bert: Any, copy: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        old = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for key, tensor in tensors.items()
        }
        assert sum("gamma" in key for key in old) == 1 + 2 * 3
        head = {
            "cls.predictions.bias": torch.zeros(512),
            "pooler.dense.bias": torch.ones(64),
        }
        return old | head | {"bert.embeddings.position_ids": torch.arange(300)[None]}

    with LLM(renamed(copy, change), **IDS) as llm:
        (output,) = llm.embed([5, 6, 7], pooling_params=RAW["cls"])
    assert distance(output.outputs.embedding, reference(bert[1], [5, 6, 7])) < 1e-5


def test_a_missing_tensor_is_named(copy: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors["encoder.layer.1.attention.self.key.weight"]
        return tensors

    with pytest.raises(ModelLoadError, match=r"missing layers\.1\.qkv_proj\.weight"):
        LLM(renamed(copy, change), **IDS)


def test_the_configuration_of_transformers_4_says_the_same(
    make_encoder: MakeEncoder, tmp_path: Path
) -> None:
    folder, model = make_encoder("ModernBertModel", **MODERN)
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    new = ModelConfig.from_folder(folder)
    del raw["layer_types"], raw["rope_parameters"]
    raw |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}
    path.write_text(json.dumps(raw | {"local_rope_theta": 10000.0}))
    old = ModelConfig.from_folder(tmp_path / "model")
    assert old.layer_windows == new.layer_windows == (None, 8, 8, None)
    assert [r and r.theta for r in old.layer_ropes] == [160000.0, 10000.0, 10000.0, 160000.0]
    [prompt] = random_prompts([100])
    with LLM(tmp_path / "model", **IDS) as llm:
        (output,) = llm.embed(prompt, pooling_params=RAW["mean"])
    assert distance(output.outputs.embedding, reference(model, prompt, "mean")) < 1e-5


def add_pooling(folder: Path, mode: Any, *kinds: str, path: str = "1_Pooling") -> Path:
    """The files of sentence-transformers."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(mode))
    modules = [
        {"idx": i, "path": path if kind == "Pooling" else "", "type": f"sentence.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    if kinds:
        (folder / "modules.json").write_text(json.dumps(modules))
    return folder


BOTH = ("Transformer", "Pooling", "Normalize")
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.mark.parametrize(
    ("mode", "kinds", "expected"),
    [
        (MEAN, BOTH, ("mean", True)),
        (MEAN, BOTH[:2], ("mean", False)),
        (MEAN, (), ("mean", True)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, BOTH, ("last", True)),
        ({"pooling_mode": "cls"}, BOTH[:2], ("cls", False)),
    ],
)
def test_vectors_are_by_default_those_of_sentence_transformers(
    bert: Any, copy: Path, mode: Any, kinds: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    [prompt] = random_prompts([20])
    with LLM(add_pooling(copy, mode, *kinds), **IDS) as llm:
        default = llm.get_default_pooling_params()
        assert (default.pooling, default.normalize) == expected
        vector = reference(bert[1], prompt, expected[0])
        unit = vector / np.linalg.norm(vector)
        (output,) = llm.embed(prompt)
        assert distance(output.outputs.embedding, unit if expected[1] else vector) < 1e-5
        own = PoolingParams(pooling="last", normalize=True)
        vector = reference(bert[1], prompt, "last")
        (output,) = llm.embed(prompt, pooling_params=own)
        assert distance(output.outputs.embedding, vector / np.linalg.norm(vector)) < 1e-5


@pytest.mark.parametrize(
    ("mode", "kinds", "path", "message"),
    [
        ({"pooling_mode_max_tokens": True}, BOTH, "1_Pooling", "max_tokens"),
        (MEAN | {"pooling_mode_cls_token": True}, BOTH, "1_Pooling", "cls_token and mean"),
        ({}, BOTH, "1_Pooling", "by nothing"),
        (MEAN, ("Transformer", "Pooling", "Dense"), "1_Pooling", "Dense can't be run"),
        (MEAN, BOTH, "2_Pooling", "2_Pooling/config.json, which modules.json lists, is missing"),
        (MEAN, BOTH, "../model/1_Pooling", "not a folder of the model"),
    ],
)
def test_pooling_that_would_be_another_is_refused(
    copy: Path, mode: Any, kinds: tuple[str, ...], path: str, message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        LLM(add_pooling(copy, mode, *kinds, path=path), **IDS)


def test_pooling_is_read_from_the_cache_of_the_hub_and_from_no_other_link(
    copy: Path, tmp_path: Path
) -> None:
    add_pooling(copy, MEAN, *BOTH)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abc", tmp_path / "hub" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(copy, snapshot)
    path = snapshot / "1_Pooling" / "config.json"
    path.rename(blobs / "abc")
    path.symlink_to("../../../blobs/abc")
    assert ModelConfig.from_folder(snapshot).pooling == "mean"
    path.unlink()
    path.symlink_to(copy / "1_Pooling" / "config.json")
    with pytest.raises(ModelLoadError, match="leaves the folder"):
        ModelConfig.from_folder(snapshot)


def make_tokenizer(model: str) -> Any:
    """A small tokenizer that puts special tokens around a text, as BERT's or XLM-RoBERTa's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["the", "food", "was", "great", "aw", "##ful", "!", "soup"]
    if model == "wordpiece":
        vocab = {word: i for i, word in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *words])}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 0))
        return tokenizer
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -float(i + 1)) for i, word in enumerate(words)]
    pieces += [(letter, -20.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


TEXTS = ["The food was great!", "awful", "", "the soup " * 40]


@pytest.mark.parametrize(
    ("name", "kind"), [("BertModel", "wordpiece"), ("XLMRobertaModel", "unigram")]
)
def test_texts_get_the_special_tokens_that_transformers_adds(
    make_encoder: MakeEncoder, tmp_path: Path, name: str, kind: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder, model = make_encoder(name)
    shutil.copytree(folder, tmp_path / "model")
    make_tokenizer(kind).save(str(tmp_path / "model" / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model" / "tokenizer.json"))
    with LLM(tmp_path / "model", **OPTIONS) as llm:
        for output, text in zip(llm.embed(TEXTS, use_tqdm=False), TEXTS, strict=True):
            ids = theirs(text)["input_ids"]
            assert output.prompt_token_ids == ids
            assert (ids[0], ids[-1]) == (0, 2)
            expected = reference(model, ids)
            unit = expected / np.linalg.norm(expected)
            assert distance(output.outputs.embedding, unit) < 1e-5


@pytest.fixture(scope="module")
def llm(bert: Any) -> Iterator[LLM]:
    folder, _ = bert
    make_tokenizer("wordpiece").save(str(folder / "tokenizer.json"))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    with LLM(folder, **OPTIONS) as llm:
        llm._thread._engine.check_integrity = True
        yield llm
        metrics = llm.get_metrics()
        assert metrics["kv_cache_usage_perc"] == metrics["num_requests_running"] == 0


def test_a_text_that_is_too_long_fails_alone_or_is_cut_before_its_end(llm: LLM, bert: Any) -> None:
    assert llm.config.max_model_len == 32
    assert not llm.config.enable_chunked_prefill and not llm.config.enable_prefix_caching
    with pytest.warns(UserWarning, match="1 of 4 prompts failed"):
        outputs = llm.embed(TEXTS, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, True, True, False]
    with pytest.raises(PromptTooLongError, match="82 tokens, and max_model_len is 32"):
        llm.embed(TEXTS[3])
    ids = llm.get_tokenizer().encode(TEXTS[3])
    for keep, num_kept in ((-1, 32), (5, 5)):
        (cut,) = llm.embed(TEXTS[3], truncate_prompt_tokens=keep)
        assert cut.prompt_token_ids == [*ids[: num_kept - 1], 2]
        expected = reference(bert[1], cut.prompt_token_ids)
        assert distance(cut.outputs.embedding, expected / np.linalg.norm(expected)) < 1e-5


def test_an_encoder_does_not_generate(llm: LLM) -> None:
    async def astream() -> None:
        async for _ in llm.astream(TEXTS[0]):
            pass

    calls: list[Callable[[], Any]] = [
        lambda: llm.generate(TEXTS[0]),
        lambda: llm.generate(TEXTS),
        lambda: list(llm.generate_iter(TEXTS)),
        lambda: list(llm.stream(TEXTS[0])),
        lambda: asyncio.run(astream()),
        lambda: asyncio.run(llm.agenerate(TEXTS)),
        lambda: pd.DataFrame({"text": TEXTS}).llm.generate("text", llm=llm),
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="embeds, it does not generate") as caught:
            call()
        assert caught.value.parameter == "model"
    assert llm.embed(TEXTS[0])[0].error is None


def test_a_frame_and_a_client_get_the_same_vectors(llm: LLM) -> None:
    frame = pd.DataFrame({"text": TEXTS[:2]})
    for pooling in (None, *POOLINGS):
        params = PoolingParams(pooling=pooling)
        outputs = llm.embed(TEXTS[:2], pooling_params=params, use_tqdm=False)
        expected = [output.outputs.embedding for output in outputs]
        cells = frame.llm.embed("text", pooling=pooling, llm=llm)["embedding"]
        assert distance(np.stack(cells.tolist()), expected) < 1e-6
    cut = frame[:1].llm.embed("text", truncate_prompt_tokens=4, llm=llm)["embedding"][0]
    assert distance(cut, llm.embed([0, 4, 5, 2])[0].outputs.embedding) < 1e-6


def test_a_server_embeds_and_refuses_to_complete(llm: LLM) -> None:
    with llm.serve() as server, server.client(max_retries=0) as client:
        import openai

        for extra in ({}, {"pooling": "cls"}, {"pooling": "mean", "normalize": False}):
            reply = client.embeddings.create(
                model=server.model_name, input=TEXTS[:2], extra_body=extra
            )
            outputs = llm.embed(TEXTS[:2], pooling_params=PoolingParams(**extra), use_tqdm=False)
            for item, output in zip(reply.data, outputs, strict=True):
                assert distance(item.embedding, output.outputs.embedding) < 1e-6
        reply = client.embeddings.create(
            model=server.model_name, input=TEXTS[3], extra_body={"truncate_prompt_tokens": 4}
        )
        expected = llm.embed(TEXTS[3], truncate_prompt_tokens=4)[0].outputs.embedding
        assert distance(reply.data[0].embedding, expected) < 1e-6
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="does not generate"):
                client.completions.create(model=server.model_name, prompt=TEXTS[0], stream=stream)


def test_cancelling_a_task_ends_its_embeddings(llm: LLM) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(llm.aembed([[5] * 30] * 3000))
        while not llm.get_metrics()["num_requests_waiting"]:  # between steps none runs
            assert not task.done()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0


def test_an_error_in_a_step_fails_its_texts_alone(llm: LLM) -> None:
    def fail(module: Any, args: Any) -> None:
        if 13 in args[0]:
            raise RuntimeError("spoilt")

    hook = llm._thread.call(lambda engine: engine.runner.model.register_forward_pre_hook(fail))
    with pytest.raises(RequestFailedError, match="spoilt"):
        llm.embed([5, 13, 6])
    assert llm.embed([5, 12, 6])[0].outputs.embedding
    llm._thread.call(lambda engine: hook.remove())
    assert llm.embed([5, 13, 6])[0].outputs.embedding


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("BertModel", {"is_decoder": True}, "only encoders"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "absolute positions"),
        ("BertModel", {"num_attention_heads": 5}, "5 heads"),
        ("BertModel", {"hidden_act": "mish"}, "activation 'mish'"),
        ("BertModel", {"layer_norm_eps": -1}, "layer_norm_eps"),
        ("BertModel", {"type_vocab_size": "two"}, "type_vocab_size"),
        ("XLMRobertaModel", {"pad_token_id": 299}, "pad_token_id"),
        ("ModernBertModel", {"layer_types": ["full_attention"]}, "1 layer_types"),
        ("ModernBertModel", {"hidden_activation": "relu"}, "activation 'relu'"),
        ("ModernBertModel", {"local_attention": 0}, "local_attention"),
        (
            "ModernBertModel",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "'dynamic'",
        ),
    ],
)
def test_a_configuration_that_can_not_be_followed_is_refused(
    make_encoder: MakeEncoder, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder, _ = make_encoder(name)
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelLoadError, match=message):
        LLM(tmp_path / "model", **IDS)


def test_there_are_as_many_tokens_as_positions_and_not_more(make_encoder: MakeEncoder) -> None:
    folder, model = make_encoder("XLMRobertaModel")
    [prompt] = random_prompts([298])
    with LLM(folder, **IDS) as llm:
        assert llm.config.max_model_len == 298  # two of 300 belong to padding
        (output,) = llm.embed(prompt, pooling_params=RAW["last"])
        assert distance(output.outputs.embedding, reference(model, prompt, "last")) < 1e-5
    with pytest.raises(InvalidRequestError, match="learned positions for 298 tokens") as caught:
        LLM(folder, max_model_len=299, **IDS)
    assert caught.value.parameter == "max_model_len"
