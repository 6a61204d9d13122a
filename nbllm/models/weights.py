"""Reading a checkpoint's tensors, one at a time, without running anything that is in it.

Files: `model.safetensors`, or shards listed by `model.safetensors.index.json`; else
`pytorch_model.bin` or its shards, through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nbllm.errors import ModelLoadError
from nbllm.model_files import find_file, has_file, read_json


class CheckpointTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: as it is stored.
        tensor: on the CPU, mapped from the file where that is possible.
        file: name of the file, for messages.
    """

    name: str
    tensor: Tensor
    file: str


def iterate_weights(folder: Path, load_format: str = "auto") -> Iterator[CheckpointTensor]:
    """Yield every tensor of the checkpoint in `folder`.

    Args:
        folder: a model folder.
        load_format: "auto" prefers safetensors; "safetensors" and "pt" insist.

    Raises:
        ModelLoadError: a file is missing, damaged or outside of the folder; names it.
    """
    seen: dict[str, str] = {}
    for path in weight_files(folder, load_format):
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        for name, tensor in read(path):
            if name in seen:
                raise ModelLoadError(f"{path.name}, tensor {name}: is in {seen[name]} too")
            seen[name] = path.name
            yield CheckpointTensor(name, tensor, path.name)


def weight_files(folder: Path, load_format: str = "auto") -> list[Path]:
    """The files that hold the weights, in the order of their names."""
    candidates = []
    if load_format in ("auto", "safetensors"):
        candidates.append(("model.safetensors", "model.safetensors.index.json"))
    if load_format in ("auto", "pt"):
        candidates.append(("pytorch_model.bin", "pytorch_model.bin.index.json"))
    for single, index in candidates:
        if has_file(folder, single):
            return [find_file(folder, single)]
        if has_file(folder, index):
            return _shards(folder, index)
    wanted = ", ".join(name for pair in candidates for name in pair)
    raise ModelLoadError(f"no weights in {folder}: looked for {wanted}")


def _shards(folder: Path, index: str) -> list[Path]:
    weight_map = read_json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} in {folder}: weight_map is missing or empty")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelLoadError(f"{index} in {folder}: weight_map holds what is no file name")
    try:
        return [find_file(folder, name) for name in sorted(set(weight_map.values()))]
    except ModelLoadError as error:
        raise ModelLoadError(f"{index}: {error}") from error


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The format's specification: github.com/huggingface/safetensors, section Format.

    The library refuses headers that are too large, lie about offsets or overlap.
    """
    from safetensors import SafetensorError, safe_open

    name = None
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        where = f", tensor {name}" if name else ""
        raise ModelLoadError(f"{path.name}{where}: damaged safetensors file: {error}") from error


def _read_torch(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        # weights_only refuses every pickled object but tensors and plain containers. A file of
        # torch 1.5 or older is no zip archive and can't be mapped.
        is_mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelLoadError(
            f"{path.name}: not a file of plain tensors: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path.name}: holds a {type(content).__name__}, not a dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{path.name}, tensor {name!r}: is a {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ModelLoadError(f"{path.name}, tensor {name}: only dense tensors are read")
        yield name, tensor
