"""How large the KV cache is, and making it.

The cache takes what the configuration can use (`max_num_seqs` sequences of `max_model_len`) or what
is free, whichever is less. Free means free now, with whatever else lives in the notebook's kernel.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nbllm.config import EngineConfig, ModelConfig
from nbllm.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

_GIB = 1024**3
_CPU_SHARE = 0.4  # of the RAM that is available: the notebook's own data needs the rest
_ENCODER_BLOCK_SIZE = 256
_CPU_LIMIT = 8 * _GIB  # pages are touched only when used, but a laptop should not be filled up


def block_size_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: keys and values."""
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    return per_token * block_size


def free_memory_bytes(device: torch.device) -> int:
    """Memory that an allocation could still get: on CUDA with torch's own unused cache."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    return _available_ram_bytes()


def resolve_config(
    config: EngineConfig,
    model: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_cache_dtype: torch.dtype | None = None,
) -> EngineConfig:
    """Fill in every `None` of a config, and fit it to the memory that is free.

    Call it when the weights are loaded, so that they no longer count as free.

    Args:
        config: what the user chose.
        model: its shape.
        device: where it runs.
        dtype: of weights and activations.
        kv_cache_dtype: of keys and values; default the same.

    Raises:
        OutOfMemoryError: the cache that was asked for does not fit; says by how much.
    """
    gc.collect()
    config = _choose_sizes(config, device, model.is_encoder)
    assert config.block_size is not None
    assert config.max_num_seqs is not None
    block_size = config.block_size
    wanted_len = config.max_model_len or model.max_context_len
    if model.is_encoder:
        return _encoder_config(config, wanted_len, device, dtype)
    per_block = block_size_bytes(model, block_size, kv_cache_dtype or dtype)
    num_blocks = config.num_gpu_blocks_override
    if num_blocks is None:
        budget = _kv_budget_bytes(config, model, device, dtype)
        useful = config.max_num_seqs * -(-wanted_len // block_size) + 1
        num_blocks = min(budget // per_block, useful)
    # One sequence of full length must fit, beside the null block, or it could never finish.
    fitting_len = (num_blocks - 1) * block_size
    if config.max_model_len is not None and fitting_len < wanted_len:
        needed = (-(-wanted_len // block_size) + 1) * per_block
        raise OutOfMemoryError(
            f"max_model_len={wanted_len} needs {_size(needed)} of KV cache, but only "
            f"{_size(max(num_blocks, 0) * per_block)} can be had "
            f"({_size(free_memory_bytes(device))} free on {device}). "
            f"Lower max_model_len to {max(fitting_len, 0)} or less, "
            "raise gpu_memory_utilization or kv_cache_memory_bytes, or free memory."
        )
    if fitting_len < block_size:
        raise OutOfMemoryError(
            f"No memory for a KV cache: one page of {block_size} tokens needs "
            f"{_size(per_block)}, and {_size(free_memory_bytes(device))} are free on {device}. "
            "Free memory, raise gpu_memory_utilization or kv_cache_memory_bytes, or take a "
            "smaller model or dtype."
        )
    max_model_len = min(wanted_len, fitting_len)
    if max_model_len < wanted_len:
        logger.warning("max_model_len is %d, not %d: no more fits", max_model_len, wanted_len)
    logger.info(
        "KV cache: %d pages of %d tokens, %s", num_blocks, block_size, _size(num_blocks * per_block)
    )
    return replace(
        config,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        num_gpu_blocks_override=num_blocks,
    )


def _encoder_config(
    config: EngineConfig, max_model_len: int, device: torch.device, dtype: torch.dtype
) -> EngineConfig:
    """Texts are computed whole, in one step, and leave nothing in a cache.

    The accounting has pages all the same, of no bytes, as many as two steps can take: those of the
    one that runs keep theirs while the next is scheduled.
    """
    assert config.max_num_seqs is not None
    assert config.max_num_batched_tokens is not None
    num_tokens = max(config.max_num_batched_tokens, max_model_len)
    num_pages = -(-num_tokens // _ENCODER_BLOCK_SIZE) + config.max_num_seqs
    return replace(
        config,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        max_num_batched_tokens=num_tokens,
        block_size=_ENCODER_BLOCK_SIZE,
        num_gpu_blocks_override=2 * num_pages + 1,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
    )


def _choose_sizes(config: EngineConfig, device: torch.device, is_encoder: bool) -> EngineConfig:
    """Sizes of pages and steps that the user left open, by the kind of device."""
    on_gpu = device.type == "cuda"
    big_gpu = on_gpu and torch.cuda.get_device_properties(device).total_memory >= 70 * _GIB
    max_num_seqs = config.max_num_seqs or (1024 if big_gpu else 256 if on_gpu else 64)
    max_num_batched_tokens = config.max_num_batched_tokens or (
        (16384 if big_gpu else 8192) if on_gpu else (1024 if is_encoder else 512)
    )
    return replace(
        config,
        block_size=config.block_size or (64 if on_gpu else 32),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
    )


def allocate_kv_caches(
    config: EngineConfig, model: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """One [2, num_blocks, num_kv_heads, block_size, head_dim] tensor per layer, zeros.

    Zeros, since attention multiplies what it masks by a probability of zero, and 0 * NaN is NaN.

    Raises:
        OutOfMemoryError: the memory went to somebody else in the meantime.
    """
    assert config.num_gpu_blocks_override is not None
    assert config.block_size is not None
    shape = (
        2,
        config.num_gpu_blocks_override,
        model.num_kv_heads,
        config.block_size,
        model.head_dim,
    )
    try:
        return [_zeros(shape, dtype, device) for _ in range(model.num_layers)]
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise OutOfMemoryError(
            f"The KV cache of {config.num_gpu_blocks_override} pages did not fit on {device}; "
            "lower gpu_memory_utilization, max_model_len or max_num_seqs."
        ) from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU the zeros are the operating system's, which hands out pages when they are touched;
    `torch.zeros` would touch them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _kv_budget_bytes(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    assert config.max_num_seqs is not None
    assert config.max_num_batched_tokens is not None
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    free = free_memory_bytes(device)
    if device.type != "cuda":
        return int(min(free * _CPU_SHARE, _CPU_LIMIT))
    # The widest activations of a step: gate and up projections, and float32 logits with the
    # copies that sampling makes of them.
    widths = 3 * model.intermediate_size + 8 * model.hidden_size
    num_tokens = config.max_num_batched_tokens * 5 // 4 + config.max_num_seqs  # of a padded step
    activations = num_tokens * widths
    logits = 4 * config.max_num_seqs * model.vocab_size
    num_pools = 1 if config.enforce_eager else 2  # captured steps have memory of their own
    reserve = num_pools * activations * dtype.itemsize + logits * 4
    return int(free * config.gpu_memory_utilization) - reserve


def _available_ram_bytes() -> int:
    """RAM that can be had without swapping, within the container's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux: half of the RAM is a safe guess
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            available = min(available, limit - int(file.read()))
    except (OSError, ValueError):
        pass  # no container, or one without a limit ("max")
    return max(available, 0)


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", _GIB), ("MiB", 1024**2)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
