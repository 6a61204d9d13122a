"""Models: one file per structure; `allocate_model` builds the right one, `fill_model` loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nbllm.config import ModelConfig
from nbllm.errors import ModelLoadError, OutOfMemoryError
from nbllm.models.causal_lm import CausalLM
from nbllm.models.encoder import Encoder
from nbllm.models.layers import pack_weights
from nbllm.models.model import Model
from nbllm.models.weights import iterate_weights, weight_files


def build_model(config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False) -> Model:
    """The model of `config.architecture` on the meta device: shapes, no memory.

    Args:
        config: the model's shape.
        max_model_len: longest sequence.
        batch_invariant: see `nbllm_kernels.linear`.

    Raises:
        ModelLoadError: the configuration asks for what this structure can't do.
        InvalidRequestError: the model has no positions for `max_model_len` tokens.
    """
    with torch.device("meta"):
        return _model_class(config.architecture)(
            config, max_model_len=max_model_len, batch_invariant=batch_invariant
        )


def _model_class(architecture: str) -> Callable[..., Model]:
    if architecture == "OPTForCausalLM":
        from nbllm.models.opt import OPT

        return OPT
    if architecture == "GPT2LMHeadModel":
        from nbllm.models.gpt2 import GPT2

        return GPT2
    if architecture.startswith("ModernBert"):
        from nbllm.models.modernbert import ModernBert

        return ModernBert
    if architecture.startswith(("Bert", "Roberta", "XLMRoberta")):
        from nbllm.models.bert import Bert

        return Bert
    from nbllm.models.decoder import Decoder

    return Decoder


@torch.no_grad()
def allocate_model(
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    max_model_len: int | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Build a model whose weights have their memory and hold anything.

    Args:
        config: the model's shape.
        folder: where the weights are.
        dtype, device: of the parameters.
        load_format: as in `fill_model`.
        max_model_len: longest sequence; default what the model was made for.
        batch_invariant: see `nbllm_kernels.linear`.

    Raises:
        ModelLoadError: files are missing, or too small for the configuration.
        OutOfMemoryError: the weights do not fit on the device.
        InvalidRequestError: the model has no positions for `max_model_len` tokens.
    """
    length = max_model_len or config.max_context_len
    model = build_model(config, max_model_len=length, batch_invariant=batch_invariant)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if load_format != "dummy":
        _check_size(num_parameters, weight_files(folder, load_format))
    try:
        _allocate_parameters(model, dtype, device)
    except RuntimeError as error:
        size = num_parameters * dtype.itemsize / 1024**3
        raise OutOfMemoryError(
            f"the weights need {size:.1f} GiB in {dtype}, which are not free on {device}; "
            "take a smaller model or dtype, or free memory"
        ) from error
    model.prepare(device)
    return model.eval()


def _allocate_parameters(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for parameters that have none yet, shared ones once.

    `Module.to_empty` would do, but for tensors without memory it imports SymPy: a second or more.
    """
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in allocated:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                allocated[parameter] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, allocated[parameter])


@torch.no_grad()
def fill_model(
    model: Model, config: ModelConfig, folder: Path, *, load_format: str = "auto"
) -> None:
    """Load the weights, or make random ones.

    Args:
        model: from `allocate_model`.
        config: its shape.
        folder: where the weights are.
        load_format: "auto", "safetensors", "pt", or "dummy": normal random numbers with a
            standard deviation of 0.02 from a fixed seed; `folder` is not read.

    Raises:
        ModelLoadError: files or tensors are missing, broken or of the wrong shape.
    """
    if load_format == "dummy":
        _fill_randomly(model, config)
    else:
        model.load_weights(iterate_weights(folder, load_format))
    pack_weights(model)


def _check_size(num_parameters: int, files: list[Path]) -> None:
    """Refuse a configuration that the files can't fill, before memory is taken for it."""
    available = sum(path.stat().st_size for path in files)
    if num_parameters > available:  # no dtype takes less than a byte
        names = ", ".join(path.name for path in files[:3])
        raise ModelLoadError(
            f"config.json describes {num_parameters:,} parameters, and {names} "
            f"has {available:,} bytes: a file is truncated or the configuration is another model's"
        )


def _fill_randomly(model: Model, config: ModelConfig) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            parameter.fill_(1.0 - config.norm_offset)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


__all__ = [
    "CausalLM",
    "Encoder",
    "Model",
    "ModelLoadError",
    "allocate_model",
    "build_model",
    "fill_model",
]
