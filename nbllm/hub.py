"""From a model's name to a local folder: the bundled demo, a path, Hugging Face or ModelScope."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nbllm.errors import ModelLoadError

DEMO_FOLDER = Path(__file__).parent / "demo"

_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
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
    if _uses_modelscope():
        return _from_modelscope(text, revision, cache_dir)
    return _from_hugging_face(text, revision, token, cache_dir, load_format)


def _from_hugging_face(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    load_format: str,
) -> Path:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        # Configuration and tokenizer first: they are small, and a wrong name fails at once.
        folder = Path(snapshot_download(name, allow_patterns=_TOKENIZER_FILES, **options))
        if load_format in ("dummy", "tokenizer"):
            return folder
        for pattern in _weight_patterns(load_format):
            snapshot_download(name, allow_patterns=[pattern], **options)
            if any(folder.glob(pattern)):
                return folder
        raise ModelLoadError(f"{name} on the hub has no weights that nbllm can read")
    except hub_errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is gated: accept its terms on its page on the hub, then pass hf_token= "
            "or log in with `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"{name} has no revision {revision!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{name} is neither a local folder nor a repository on the hub that you may read; "
            "check the name, or pass hf_token= for a private one"
        ) from error
    except hub_errors.HFValidationError as error:
        raise ModelLoadError(f"{name!r} is not a valid repository name: {error}") from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{name} is not in the local cache and the hub can't be reached (or HF_HUB_OFFLINE is "
            "set): connect once, or pass the path of a folder. LLM() without a name needs no hub."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise ModelLoadError(
            f"downloading {name} failed: {error}. Run it again to go on where it stopped."
        ) from error


def _weight_patterns(load_format: str) -> list[str]:
    patterns = {"safetensors": ["*.safetensors"], "pt": ["pytorch_model*.bin"]}
    return patterns.get(load_format, ["*.safetensors", "pytorch_model*.bin"])


def _uses_modelscope() -> bool:
    names = ("NBLLM_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    return any(os.environ.get(name, "").strip().lower() in _TRUE_WORDS for name in names)


def _from_modelscope(name: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            "NBLLM_USE_MODELSCOPE is set, but modelscope is not installed: pip install modelscope"
        ) from error
    try:
        cache = str(cache_dir) if cache_dir is not None else None
        return Path(snapshot_download(name, revision=revision, cache_dir=cache))
    except Exception as error:  # its errors have no common base
        raise ModelLoadError(f"downloading {name} from ModelScope failed: {error}") from error
