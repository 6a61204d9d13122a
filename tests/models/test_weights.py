"""Checkpoints in every form they come in: one file or many, safetensors or torch, any dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbllm import LLM, ModelLoadError, SamplingParams
from nbllm.config import ModelConfig
from nbllm.model_config import read_model_config
from nbllm.models import CausalLM, allocate_model, fill_model
from nbllm.models.weights import iterate_weights, weight_files

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 17, 300, 44, 123]
CPU = torch.device("cpu")


def load_model(config: ModelConfig, folder: Path, dtype: torch.dtype) -> CausalLM:
    model = allocate_model(config, folder, dtype=dtype, device=CPU)
    fill_model(model, config, folder)
    return model


@pytest.fixture
def llama(make_checkpoint: Callable[..., Any]) -> tuple[Path, Any]:
    return make_checkpoint("Llama")


def write(
    llama: tuple[Path, Any],
    folder: Path,
    form: str,
    *,
    dtype: torch.dtype = torch.float32,
    num_files: int = 1,
) -> Path:
    """The checkpoint in another form: "safetensors", "bin" or "old-bin" (of torch 1.5)."""
    source, _ = llama
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t.to(dtype) for n, t in load_file(source / "model.safetensors").items()}
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        part = dict(list(tensors.items())[number::num_files])
        file = f"{stem}.{suffix}"
        if num_files > 1:
            file = f"{stem}-{number + 1:05}-of-{num_files:05}.{suffix}"
        if form == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=form == "bin")
        weight_map |= dict.fromkeys(part, file)
    if num_files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin", "old-bin"])
def test_every_form_of_a_checkpoint_gives_the_same_tokens(
    llama: tuple[Path, Any],
    tmp_path: Path,
    generate_greedily: Callable[..., list[int]],
    form: str,
    num_files: int,
) -> None:
    folder = write(llama, tmp_path, form, num_files=num_files)
    with LLM(folder, skip_tokenizer_init=True, device="cpu") as llm:
        assert llm.config.dtype == "float32"
        tokens = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    assert tokens == generate_greedily(llama[1], PROMPT, 8)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_stored_dtype_becomes_the_one_that_is_asked_for(
    llama: tuple[Path, Any], tmp_path: Path, stored: torch.dtype, form: str
) -> None:
    folder = write(llama, tmp_path, form, dtype=stored)
    config = read_model_config(folder)
    expected = {item.name: item.tensor for item in iterate_weights(folder)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = load_model(config, folder, dtype)
        parameters = dict(model.named_parameters())
        assert {p.dtype for p in parameters.values()} == {dtype}
        norm = expected["model.norm.weight"].to(dtype)
        assert torch.equal(parameters["norm.weight"], norm)
        embedding = expected["model.embed_tokens.weight"].to(dtype)
        assert torch.equal(parameters["embed_tokens.weight"], embedding)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "half", "float", "auto"])
def test_a_model_runs_in_every_dtype(llama: tuple[Path, Any], tmp_path: Path, dtype: str) -> None:
    folder = write(llama, tmp_path, "safetensors", dtype=torch.float16)
    with LLM(folder, skip_tokenizer_init=True, device="cpu", dtype=dtype) as llm:
        # A CPU computes float16 slowly: "auto" widens it.
        names = {"half": "float16", "float": "float32", "auto": "float32"}
        assert llm.config.dtype == names.get(dtype, dtype)
        assert len(llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids) == 8


def test_safetensors_come_first_unless_told_otherwise(
    llama: tuple[Path, Any], tmp_path: Path
) -> None:
    write(llama, tmp_path, "bin")
    with pytest.raises(ModelLoadError, match=r"looked for model\.safetensors"):
        weight_files(tmp_path, "safetensors")
    write(llama, tmp_path, "safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    assert [path.name for path in weight_files(tmp_path, "pt")] == ["pytorch_model.bin"]


def test_dummy_weights_need_a_configuration_only_and_are_the_same_each_time(
    llama: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copy(llama[0] / "config.json", tmp_path)
    runs = []
    for _ in range(2):
        with LLM(
            tmp_path, load_format="dummy", skip_tokenizer_init=True, device="cpu", dtype="float32"
        ) as llm:
            runs.append(llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids)
    assert runs[0] == runs[1] and len(runs[0]) == 8


def test_a_tensor_that_overflows_the_dtype_is_named(
    llama: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = write(llama, tmp_path, "safetensors", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e20
    save_file(tensors, folder / "model.safetensors")
    config = read_model_config(folder)
    load_model(config, folder, torch.bfloat16)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight: .*infinity in torch\.float16"):
        load_model(config, folder, torch.float16)
