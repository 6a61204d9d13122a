"""Reading a checkpoint's tensors, one at a time, without running anything that is in it.

Files: `model.safetensors`, or shards listed by `model.safetensors.index.json`; else
`pytorch_model.bin` or its shards, through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nbllm.errors import ModelLoadError


def iterate_weights(folder: Path, load_format: str = "auto") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) for every tensor of the checkpoint in `folder`.

    Args:
        folder: a model folder.
        load_format: "auto" prefers safetensors; "safetensors" and "pt" insist.

    Raises:
        ModelLoadError: a file is missing, damaged or outside of the folder; names it.
    """
    seen: set[str] = set()
    for path in weight_files(folder, load_format):
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        for name, tensor in read(path):
            if name in seen:
                raise ModelLoadError(f"{path.name}: tensor {name} is in another file too")
            seen.add(name)
            yield name, tensor


def weight_files(folder: Path, load_format: str = "auto") -> list[Path]:
    """The files that hold the weights, in the order of their names."""
    candidates = []
    if load_format in ("auto", "safetensors"):
        candidates.append(("model.safetensors", "model.safetensors.index.json"))
    if load_format in ("auto", "pt"):
        candidates.append(("pytorch_model.bin", "pytorch_model.bin.index.json"))
    for single, index in candidates:
        if (folder / single).exists():
            return [_inside(folder, single)]
        if (folder / index).exists():
            return _shards(folder, index)
    wanted = ", ".join(name for pair in candidates for name in pair)
    raise ModelLoadError(f"no weights in {folder}: looked for {wanted}")


def _shards(folder: Path, index: str) -> list[Path]:
    try:
        weight_map = json.loads(_inside(folder, index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index}: no usable weight_map: {error!r}") from error
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: object) -> Path:
    """The file `name` in the folder; an index must not lead anywhere else.

    A cache of the hub links its files into the `blobs` folder of the same repository, which is
    fine: it is the client that made those links.
    """
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ModelLoadError(f"weight file {name!r}: not a plain file name")
    path = folder / name
    if not path.exists():
        raise ModelLoadError(f"weight file {name} is missing in {folder}")
    if not path.is_file():
        raise ModelLoadError(f"weight file {name} in {folder} is not a file")
    target, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if target.parent != home and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise ModelLoadError(f"weight file {name} is a link that leaves the folder {folder}")
    return path


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
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
        # weights_only refuses every pickled object but tensors and plain containers.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        try:  # files older than torch 1.6 can't be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise ModelLoadError(
                f"{path.name}: not a file of plain tensors: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}"
            ) from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path.name}: holds a {type(content).__name__}, not a dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{path.name}: entry {name!r} is no tensor")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ModelLoadError(f"{path.name}, tensor {name}: only dense tensors are read")
        yield name, tensor
