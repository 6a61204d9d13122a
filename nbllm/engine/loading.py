"""From a model's folder to an engine that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.compile_ahead import compile_ahead, compile_later
from nbllm.engine.encoder_runner import EncoderRunner
from nbllm.engine.engine import Engine
from nbllm.engine.kv_cache import resolve_config
from nbllm.engine.model_runner import ModelRunner
from nbllm.engine.runner import Runner
from nbllm.errors import InvalidRequestError, MissingCompilerError, ModelLoadError
from nbllm.models import CausalLM, Encoder, allocate_model, fill_model
from nbllm_kernels import release_threads, rms_norm


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine and the shape of its model."""

    engine: Engine
    model_config: ModelConfig


def load_engine(folder: Path, config: EngineConfig, *, load_format: str = "auto") -> LoadedEngine:
    """Load the weights, size and allocate the KV cache.

    Args:
        folder: holds config.json and the weights.
        config: what the user chose.
        load_format: "auto", "safetensors", "pt" or "dummy".

    Raises:
        ModelLoadError: the folder's content is missing, broken or of an unknown kind.
        OutOfMemoryError: weights or KV cache do not fit.
        InvalidRequestError: the device is not there.
        MissingCompilerError: nor is what its kernels are built with.
    """
    model_config = ModelConfig.from_folder(folder)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    if load_format not in ("auto", "safetensors", "pt", "dummy"):
        raise InvalidRequestError(
            f"load_format must be 'auto', 'safetensors', 'pt' or 'dummy', got {load_format!r}",
            parameter="load_format",
        )
    if device.type == "cuda":
        _launch_first_kernel(model_config, device, dtype)
        # PyTorch keeps the memory of streams apart. All of an engine's is its own stream's: what
        # others in this process allocate does not lie between, and all can be given back.
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            return _load(folder, config, model_config, device, dtype, load_format, stream)
    return _load(folder, config, model_config, device, dtype, load_format, None)


def _load(
    folder: Path,
    config: EngineConfig,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str,
    stream: torch.cuda.Stream | None,
) -> LoadedEngine:
    model = allocate_model(
        model_config,
        folder,
        dtype=dtype,
        device=device,
        load_format=load_format,
        max_model_len=config.max_model_len,
        batch_invariant=config.batch_invariant,
    )

    def make_runner() -> tuple[EngineConfig, Runner[Any]]:
        kv_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, dtype, device)
        resolved = resolve_config(
            config, model_config, device=device, dtype=dtype, kv_cache_dtype=kv_dtype
        )
        place: dict[str, Any] = {"device": device, "stream": stream}
        if isinstance(model, Encoder):
            return resolved, EncoderRunner(model, model_config, resolved, **place)
        assert isinstance(model, CausalLM)
        runner = ModelRunner(model, model_config, resolved, kv_cache_dtype=kv_dtype, **place)
        return resolved, runner

    if stream is not None:
        resolved, runner = make_runner()
        with compile_ahead(runner):
            fill_model(model, model_config, folder, load_format=load_format)
        stream.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # there is one for each thread that has ended
        compile_later(runner)
    else:  # where memory is taken by what is written, not by what is allocated
        fill_model(model, model_config, folder, load_format=load_format)
        resolved, runner = make_runner()
    release_threads()  # from here on the engine's thread computes
    return LoadedEngine(Engine(runner, resolved), model_config)


def _launch_first_kernel(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """What keeps kernels from running is said before the weights are loaded."""
    x = torch.zeros(1, config.hidden_size, dtype=dtype, device=device)
    try:
        with torch.cuda.device(device):
            rms_norm(x, x[0], config.rms_norm_eps)
    except Exception as error:
        from nbllm_kernels.gpu.toolchain import diagnose

        message = diagnose(error)
        if message is None:
            raise
        raise MissingCompilerError(message) from error


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU.

    Raises:
        InvalidRequestError: no such device on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequestError(f"device={device!r}: {error}", parameter="device") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise InvalidRequestError(
                f"device={device!r}, but torch sees {count} CUDA devices", parameter="device"
            )
        return torch.device("cuda", resolved.index or 0)
    if resolved.type != "cpu":
        raise InvalidRequestError(
            f"device must be 'auto', 'cpu' or 'cuda', got {device!r}", parameter="device"
        )
    return resolved


def resolve_dtype(choice: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype of weights, activations and KV cache.

    "auto" keeps the checkpoint's, unless the device is slow or unable with it: float32 becomes
    half precision on a GPU (as in vLLM); half precision becomes float32 on a CPU without it.
    """
    names = {"half": "float16", "float": "float32"}
    name = names.get(choice, choice)
    if name == "auto":
        name = checkpoint
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
            if name == "float32" or (name == "bfloat16" and not has_bfloat16):
                name = "bfloat16" if has_bfloat16 else "float16"
        elif name == "float16" or (name == "bfloat16" and not _cpu_has_bfloat16()):
            name = "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelLoadError(f"config.json asks for the unknown dtype {name!r}; pass dtype=")
    return dtype


def resolve_kv_cache_dtype(choice: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of keys and values.

    Args:
        choice: "auto" is the model's; "fp8" and "fp8_e4m3" are float8 (e4m3).
        dtype: of the model.
        device: where it runs.

    Raises:
        InvalidRequestError: the GPU has no float8.
    """
    if choice == "auto":
        return dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InvalidRequestError(
            f"kv_cache_dtype={choice!r} needs a GPU with float8 (compute capability 8.9 or more); "
            f"{torch.cuda.get_device_name(device)} has none",
            parameter="kv_cache_dtype",
        )
    return torch.float8_e4m3fn


def _cpu_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
