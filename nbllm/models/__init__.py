"""Models: one file per structure; `load_model` builds the right one and fills it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbllm.config import ModelConfig
from nbllm.errors import ModelLoadError, OutOfMemoryError
from nbllm.models.layers import pack_linears
from nbllm.models.weights import iterate_weights


def build_model(
    config: ModelConfig, *, max_model_len: int, batch_invariant: bool = False
) -> nn.Module:
    """The model of `config.architecture` on the meta device: shapes, no memory."""
    if config.architecture in ("OPTForCausalLM", "GPT2LMHeadModel"):
        raise ModelLoadError(f"config.json: {config.architecture} is not supported")
    options: dict[str, Any] = {"max_model_len": max_model_len, "batch_invariant": batch_invariant}
    with torch.device("meta"):
        from nbllm.models.decoder import Decoder

        return Decoder(config, **options)


@torch.no_grad()
def load_model(
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    max_model_len: int | None = None,
    batch_invariant: bool = False,
) -> nn.Module:
    """Build a model and load its weights, or make random ones.

    Args:
        config: the model's shape.
        folder: where the weights are.
        dtype, device: of the parameters.
        load_format: "auto", "safetensors", "pt", or "dummy": normal random numbers with a
            standard deviation of 0.02 from a fixed seed; `folder` is not read.
        max_model_len: longest sequence; default what the model was made for.
        batch_invariant: see `nbllm_kernels.linear`.

    Raises:
        ModelLoadError: files or tensors are missing, broken or of the wrong shape.
        OutOfMemoryError: the weights do not fit on the device.
    """
    length = max_model_len or config.max_position_embeddings
    model = build_model(config, max_model_len=length, batch_invariant=batch_invariant)
    model = model.to(dtype=dtype)
    try:
        model = model.to_empty(device=device)
    except RuntimeError as error:
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize / 1024**3
        raise OutOfMemoryError(
            f"the weights need {size:.1f} GiB in {dtype}, which are not free on {device}; "
            "take a smaller model or dtype, or free memory"
        ) from error
    if load_format == "dummy":
        _fill_randomly(model, device)
    else:
        model.load_weights(iterate_weights(folder, load_format))  # type: ignore[operator]
    model.prepare(device)  # type: ignore[operator]
    pack_linears(model)
    return model.eval()


def _fill_randomly(model: nn.Module, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


__all__ = ["ModelLoadError", "build_model", "load_model"]
