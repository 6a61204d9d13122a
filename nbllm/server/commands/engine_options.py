"""Options of the engine on a command line, under vLLM's names, and from a YAML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nbllm.errors import InvalidRequestError

_VALUES: dict[str, tuple[type, str]] = {
    "device": (str, "auto, cpu, cuda or cuda:N"),
    "dtype": (str, "auto, float32, float16 or bfloat16"),
    "kv_cache_dtype": (str, "auto or fp8"),
    "max_model_len": (int, "most tokens of prompt and output together"),
    "max_num_seqs": (int, "requests that run at once"),
    "max_num_batched_tokens": (int, "tokens of one step"),
    "block_size": (int, "tokens of a page"),
    "gpu_memory_utilization": (float, "share of the free GPU memory to use"),
    "kv_cache_memory_bytes": (int, "exact size of the KV cache"),
    "max_logprobs": (int, "most log-probabilities that are reported of a token"),
    "seed": (int, "for requests that bring none"),
    "scheduling_policy": (str, "fcfs or priority"),
    "load_format": (str, "auto, safetensors, pt or dummy"),
    "tokenizer": (str, "folder or name, if it is not the model's"),
    "revision": (str, "branch, tag or commit on the hub"),
    "tokenizer_revision": (str, "the same for the tokenizer"),
    "hf_token": (str, "access token for the hub"),
    "download_dir": (str, "folder for downloads"),
}
_SWITCHES = {
    "enable_prefix_caching": "share the pages of equal prefixes (default)",
    "enable_chunked_prefill": "split long prompts (default)",
    "enforce_eager": "no CUDA graphs",
    "batch_invariant": "bitwise the same result in any batch, slower",
}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, `--config`, and the options of `LLM`."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="see --model")
    parser.add_argument("--model", help="folder or name on the hub; default: the bundled model")
    parser.add_argument("--config", type=Path, help="YAML with options of this command line")
    parser.add_argument(
        "--chat-template", help="file, or the Jinja text itself, instead of the tokenizer's"
    )
    group = parser.add_argument_group("engine")
    for name, (kind, text) in _VALUES.items():
        group.add_argument(_flag(name), type=kind, help=text)
    for name, text in _SWITCHES.items():
        action = argparse.BooleanOptionalAction
        group.add_argument(_flag(name), action=action, default=None, help=text)


def read_config(arguments: argparse.Namespace) -> None:
    """Set what `--config` says and the command line does not.

    Raises:
        InvalidRequestError: the file can't be read, or names an option that there is not.
    """
    if arguments.config is None:
        return
    import yaml

    try:
        options = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidRequestError(
            f"{arguments.config} can't be read: {error}", parameter="config"
        ) from error
    if not isinstance(options, dict):
        raise InvalidRequestError(
            f"{arguments.config} must map options to values", parameter="config"
        )
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if not hasattr(arguments, name) or name in ("config", "run", "command"):
            raise InvalidRequestError(
                f"{arguments.config}: there is no option {key!r}", parameter="config"
            )
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def llm_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM`, the model included.

    Raises:
        InvalidRequestError: the model is named twice, or the template's file can't be read.
    """
    if arguments.model_tag is not None and arguments.model is not None:
        raise InvalidRequestError("the model is named twice", parameter="model")
    options = {
        name: getattr(arguments, name)
        for name in (*_VALUES, *_SWITCHES)
        if getattr(arguments, name) is not None
    }
    options["model"] = arguments.model_tag or arguments.model
    if arguments.chat_template is not None:
        options["chat_template"] = _template(arguments.chat_template)
    return options


def _template(text: str) -> str:
    if "{" in text or "\n" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"the chat template {text} can't be read: {error}", parameter="chat_template"
        ) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
