"""What sentence-transformers wrote beside a model: how its hidden states become one vector.

`modules.json` lists the parts, of which the first is the model; the `config.json` in the folder of
the part named Pooling, usually `1_Pooling`, says what is pooled; `sentence_bert_config.json` has
the length to which texts are cut.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nbllm.errors import ModelLoadError
from nbllm.model_files import find_file, has_file, read_json

logger = logging.getLogger(__name__)

_POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
_POOLINGS |= {name: name for name in ("cls", "mean")}
_FOLDER = "1_Pooling"


def read_pooling(folder: Path, *, is_encoder: bool) -> dict[str, Any]:
    """Fields of `ModelConfig`, those that the folder has something about.

    Args:
        folder: of the model.
        is_encoder: it can't be used but for embeddings, so that what is missing is an error.

    Raises:
        ModelLoadError: a file is missing or damaged, or asks for what nbllm can't do.
    """
    fields: dict[str, Any] = {}
    name = "sentence_bert_config.json"
    length = read_json(folder, name).get("max_seq_length") if has_file(folder, name) else None
    if length is not None:
        if type(length) is not int or length < 1:
            raise ModelLoadError(f"{name}: max_seq_length is {length!r:.40}, not a length")
        fields["max_seq_length"] = length
    pooling_folder = _FOLDER
    if has_file(folder, "modules.json"):
        modules = _read_modules(folder)
        unknown = sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"})
        if unknown:
            raise ModelLoadError(
                f"modules.json: {', '.join(unknown)} can't be run, and without it embeddings would "
                "be others than the model's"
            )
        fields["normalize"] = "Normalize" in modules
        pooling_folder = modules.get("Pooling", "")
        if pooling_folder and not has_file(folder, pooling_folder):
            message = f"{pooling_folder}/config.json, which modules.json lists, is missing"
            if is_encoder:
                raise ModelLoadError(f"{message} in {folder}")
            logger.warning("%s: embeddings are the last token's", message)
    if pooling_folder and has_file(folder, pooling_folder):
        fields["pooling"] = _read_pooling_mode(folder, pooling_folder)
    return fields


def _read_modules(folder: Path) -> dict[str, str]:
    """Kind of each module -> its folder."""
    path = find_file(folder, "modules.json")
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return {str(m["type"]).rpartition(".")[2]: str(m["path"]) for m in modules}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelLoadError(f"modules.json in {folder} can't be read: {error!r:.200}") from error


def _read_pooling_mode(folder: Path, name: str) -> str:
    if Path(name).name != name or name == "..":
        raise ModelLoadError(f"modules.json: {name!r:.100} is not a folder of the model")
    # A cache of the hub links its files into the `blobs` folder of the same repository.
    target, home = (folder / name / "config.json").resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    is_cached = home.parent.name == "snapshots" and target.parent == blobs
    if target.parent != home / name and not is_cached:
        raise ModelLoadError(f"{name}/config.json in {folder} is a link that leaves the folder")
    content = read_json(target.parent, target.name)
    modes = [
        key.removeprefix("pooling_mode_")
        for key, value in content.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if isinstance(content.get("pooling_mode"), str):  # as later versions write it
        modes = [content["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelLoadError(
            f"{name}/config.json: pooling {' and '.join(modes)[:100] or 'by nothing'!r} is not "
            f"supported; supported is one of {', '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]
