"""From a model's name to a local folder: the bundled demo, a path, Hugging Face or ModelScope."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from nbllm.errors import ModelLoadError
from nbllm.model_files import has_file, read_json

DEMO_FOLDER = Path(__file__).parent / "demo"

# The index files of the weights are among the *.json.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model", "*.tiktoken"]
_POOLING = "*_Pooling/config.json"  # of sentence-transformers: how hidden states become a vector
_COMMIT = re.compile("[0-9a-f]{40}")
_TRUE_WORDS = ("1", "true", "yes", "on")


def resolve_model(
    name: str | Path | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    load_format: str = "auto",
) -> Path:
    """The folder that holds a model, downloaded if need be.

    Args:
        name: None for the bundled demo model, a local folder, or "owner/name" on the hub.
        revision: branch, tag or commit; used for every file.
        token: access token, or True for the one that `huggingface-cli login` stored.
        cache_dir: where downloads go.
        load_format: which weights are needed; "dummy" and "tokenizer" need none.

    Raises:
        ModelLoadError: nothing there, no access or no network; says what to do.
    """
    if name is None:
        return DEMO_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelLoadError(f"there is no folder {text}")
    cache = str(cache_dir) if cache_dir is not None else None
    if _uses_modelscope():
        return _from_modelscope(text, revision, cache, load_format)
    return _from_hugging_face(text, revision, token, cache, load_format)


def _from_hugging_face(
    name: str, revision: str | None, token: str | bool | None, cache: str | None, load_format: str
) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    download = partial(snapshot_download, name, token=token, cache_dir=cache)
    fetch = partial(download, ignore_patterns=["*/*"])
    api = HfApi(token=token)
    try:
        folder = Path(fetch(allow_patterns=_SMALL_FILES, revision=revision))
        # The commit that was found, for all that follows: a branch may move in between.
        commit = folder.name if _COMMIT.fullmatch(folder.name) else None
        if has_file(folder, "modules.json"):
            download(allow_patterns=[_POOLING], revision=commit or revision)
        if commit is not None and _weights_are_in(folder, load_format):
            return folder
        files = api.list_repo_files(name, revision=commit or revision)
        wanted = _needed_weights(name, folder, set(files), load_format)
        fetch(allow_patterns=wanted, revision=commit or revision)
        return folder
    except ModelLoadError:
        raise
    except Exception as error:  # of the hub's client and of two HTTP libraries, by version
        raise ModelLoadError(_explain(name, revision, error)) from error


def _from_modelscope(name: str, revision: str | None, cache: str | None, load_format: str) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            "NBLLM_USE_MODELSCOPE or VLLM_USE_MODELSCOPE is set, but modelscope can't be imported "
            f"({error}): pip install modelscope"
        ) from error
    fetch = partial(snapshot_download, name, cache_dir=cache, revision=revision)
    try:
        folder = Path(fetch(allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"]))
        if has_file(folder, "modules.json"):
            fetch(allow_patterns=[_POOLING])
        if load_format in ("dummy", "tokenizer"):
            return folder
        for single in _weight_names(load_format):
            files = _weight_files(folder, single)
            fetch(allow_patterns=files)
            if all(has_file(folder, file) for file in files):
                return folder
    except ModelLoadError:
        raise
    except Exception as error:  # its errors have no common base
        raise ModelLoadError(
            f"downloading {name} from ModelScope failed: {_first_line(error)}"
        ) from error
    raise _no_weights(name, load_format)


def _weights_are_in(folder: Path, load_format: str) -> bool:
    """True if nothing is left to download."""
    if load_format in ("dummy", "tokenizer"):
        return True
    candidates = (_weight_files(folder, single) for single in _weight_names(load_format))
    return any(all(has_file(folder, file) for file in files) for files in candidates)


def _needed_weights(name: str, folder: Path, on_hub: set[str], load_format: str) -> list[str]:
    """The files of the first kind of weights that the repository has."""
    if load_format in ("dummy", "tokenizer"):
        return []
    for single in _weight_names(load_format):
        files = _weight_files(folder, single)
        missing = sorted(set(files) - on_hub)
        if not missing:
            return files
        if files != [single]:
            raise ModelLoadError(
                f"{single}.index.json of {name} lists {missing[0]}, which is not on the hub"
            )
    raise _no_weights(name, load_format)


def _no_weights(name: str, load_format: str) -> ModelLoadError:
    looked_for = ", ".join(_weight_names(load_format))
    return ModelLoadError(
        f"{name} on the hub has no weights that nbllm can read: looked for {looked_for} and shards"
    )


def _weight_names(load_format: str) -> list[str]:
    names = {"safetensors": ["model.safetensors"], "pt": ["pytorch_model.bin"]}
    return names.get(load_format, ["model.safetensors", "pytorch_model.bin"])


def _weight_files(folder: Path, single: str) -> list[str]:
    """The shards that the index of `single` lists, or, without an index, `single`."""
    index = f"{single}.index.json"
    if not has_file(folder, index):
        return [single]
    weight_map = read_json(folder, index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelLoadError(f"{index}: weight_map does not list the names of weight files")
    return sorted(set(names))


def _explain(name: str, revision: str | None, error: Exception) -> str:
    """What went wrong with a download, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its licence on its page on the hub, then pass hf_token= "
            "or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is neither a local folder nor a repository on the hub that you may read; "
            "check the name, or pass hf_token= for a private one"
        )
    if status in (401, 403):
        return f"the hub does not let you read {name}: check hf_token= ({_first_line(error)})"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is not a valid repository name: {_first_line(error)}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{name} is not in the local cache, or not all of it, and the hub can't be reached "
            f"(or HF_HUB_OFFLINE is set): connect once, or pass the path of a folder. LLM() "
            f"without a name needs no hub. ({_first_line(error.__cause__ or error)})"
        )
    return (
        f"downloading {name} failed: {_first_line(error)}. Run it again: complete files are kept."
    )


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _uses_modelscope() -> bool:
    names = ("NBLLM_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    return any(os.environ.get(name, "").strip().lower() in _TRUE_WORDS for name in names)
