"""The size of the KV cache: what can be used, what is free, and clear errors in between."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbllm import InvalidRequestError, OutOfMemoryError
from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine import kv_cache
from nbllm.engine.kv_cache import allocate_kv_caches, block_size_bytes, resolve_config

CPU = torch.device("cpu")
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    dtype="float32",
    tie_word_embeddings=False,
    eos_token_ids=(1,),
    bos_token_id=0,
    hidden_act="silu",
    generation_config={},
    raw={},
)
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, float32


def resolve(free: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> EngineConfig:
    monkeypatch.setattr(kv_cache, "free_memory_bytes", lambda device: free)
    config = EngineConfig(**({"block_size": 16} | options))
    return resolve_config(config, MODEL, device=CPU, dtype=torch.float32)


def test_the_cache_holds_what_the_configuration_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(1 << 40, monkeypatch, max_num_seqs=4, max_model_len=100)
    assert config.num_gpu_blocks_override == 4 * 7 + 1  # seven pages each, and the null block


def test_the_cache_takes_no_more_than_a_share_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 10_000 * TOKEN_BYTES
    config = resolve(free, monkeypatch)
    assert config.num_gpu_blocks_override is not None
    assert config.num_gpu_blocks_override * 16 * TOKEN_BYTES <= free // 2
    assert config.max_model_len == 1024


def test_without_room_for_the_models_context_it_is_shortened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = resolve(0, monkeypatch, kv_cache_memory_bytes=11 * 16 * TOKEN_BYTES)
    assert config.max_model_len == 160


def test_a_context_that_was_asked_for_and_does_not_fit_is_an_error_with_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(OutOfMemoryError, match=r"Lower max_model_len to 160 or less") as caught:
        resolve(0, monkeypatch, max_model_len=500, kv_cache_memory_bytes=11 * 16 * TOKEN_BYTES)
    assert "max_model_len=500 needs" in str(caught.value)


def test_no_memory_at_all_is_an_error_that_names_the_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes"):
        resolve(1000, monkeypatch)


def test_memory_that_went_to_somebody_else_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = resolve(1 << 40, monkeypatch)
    config = replace(config, num_gpu_blocks_override=1 << 40)
    with pytest.raises(OutOfMemoryError, match="lower gpu_memory_utilization"):
        allocate_kv_caches(config, MODEL, device=CPU, dtype=torch.float32)


def test_a_pages_size_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(1 << 40, monkeypatch, max_num_seqs=1, max_model_len=64)
    caches = allocate_kv_caches(config, MODEL, device=CPU, dtype=torch.float32)
    assert config.num_gpu_blocks_override is not None
    expected = config.num_gpu_blocks_override * block_size_bytes(MODEL, 16, torch.float32)
    assert sum(cache.nbytes for cache in caches) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_pages_on_the_cpu_take_no_ram_until_they_are_used() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    num_blocks = 400_000_000 // (16 * TOKEN_BYTES)
    config = EngineConfig(num_gpu_blocks_override=num_blocks, block_size=16)
    before = resident_bytes()
    caches = allocate_kv_caches(config, MODEL, device=CPU, dtype=torch.float32)
    assert sum(cache.nbytes for cache in caches) > 390_000_000
    assert resident_bytes() - before < 40_000_000
    assert not caches[1][:, -1].any()


def test_float8_takes_a_quarter_of_the_memory_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "free_memory_bytes", lambda device: 10_000 * TOKEN_BYTES)
    config = EngineConfig(block_size=16, max_num_seqs=64)
    plain, fp8 = (
        resolve_config(config, MODEL, device=CPU, dtype=torch.float32, kv_cache_dtype=dtype)
        for dtype in (None, torch.float8_e4m3fn)
    )
    assert plain.num_gpu_blocks_override is not None
    assert fp8.num_gpu_blocks_override == 4 * plain.num_gpu_blocks_override


def test_an_unknown_dtype_of_the_cache_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="'auto', 'fp8' or 'fp8_e4m3'") as caught:
        EngineConfig(kv_cache_dtype="int4")
    assert caught.value.parameter == "kv_cache_dtype"
