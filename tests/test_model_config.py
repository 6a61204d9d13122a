"""config.json is understood in both of its spellings, transformers 4 and 5, and with its gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbllm import ModelLoadError
from nbllm.config import ModelConfig
from nbllm.model_config import parse_model_config

BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def parse(architecture: str, **values: Any) -> ModelConfig:
    return parse_model_config(BASE | {"architectures": [architecture]} | values, {})


def test_what_a_file_leaves_out_is_what_transformers_assumes() -> None:
    config = parse("LlamaForCausalLM")
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (4, 16, "float32")
    assert config.eos_token_ids == () and not config.tie_word_embeddings
    assert config.layer_windows == (None,) * 4
    rope = config.layer_ropes[0]
    assert rope is not None and (rope.rope_type, rope.theta, rope.rotary_dim) == (
        "default",
        1e4,
        16,
    )
    for model_type in ("gemma2", "gemma3_text", "gpt2", "opt", "smollm3"):
        assert parse("LlamaForCausalLM", model_type=model_type).tie_word_embeddings


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
    ],
)
def test_both_spellings_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    first, second = parse("LlamaForCausalLM", **old), parse("LlamaForCausalLM", **new)
    assert first.dtype == second.dtype
    for a, b in zip(first.layer_ropes, second.layer_ropes, strict=True):
        assert a is not None and b is not None
        assert (a.rope_type, a.theta) == (b.rope_type, b.theta)
        assert a.parameters.get("factor") == b.parameters.get("factor")


def test_gemma_3_has_two_rotary_embeddings_in_both_spellings() -> None:
    old = parse(
        "Gemma3ForCausalLM",
        num_hidden_layers=6,
        sliding_window=32,
        sliding_window_pattern=3,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = parse(
        "Gemma3ForCausalLM",
        num_hidden_layers=6,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters={"full_attention": full, "sliding_attention": {"rope_theta": 1e4}},
    )
    for config in (old, new):
        assert config.layer_windows == (32, 32, None, 32, 32, None)
        kinds = [(r.rope_type, r.theta) for r in config.layer_ropes if r is not None]
        assert kinds == [("default", 1e4), ("default", 1e4), ("linear", 1e6)] * 2


def test_sliding_windows_follow_the_rules_of_their_family() -> None:
    assert parse("MistralForCausalLM", sliding_window=8).layer_windows == (8,) * 4
    assert parse("MistralForCausalLM", sliding_window=None).layer_windows == (None,) * 4
    assert parse("Gemma2ForCausalLM", sliding_window=8).layer_windows == (8, None, 8, None)
    qwen = {"sliding_window": 8, "max_window_layers": 3}
    assert parse("Qwen2ForCausalLM", **qwen).layer_windows == (None,) * 4
    windows = parse("Qwen2ForCausalLM", use_sliding_window=True, **qwen).layer_windows
    assert windows == (None, None, None, 8)
    # Llama has no windows, whatever the file says.
    assert parse("LlamaForCausalLM", sliding_window=8).layer_windows == (None,) * 4


def test_gpt2_and_opt_spell_their_sizes_in_their_own_way() -> None:
    sizes = {"n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": 99, "vocab_size": 7}
    gpt2 = parse_model_config(
        sizes | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_inner": None}, {}
    )
    assert (gpt2.hidden_size, gpt2.num_layers, gpt2.max_position_embeddings) == (48, 2, 99)
    assert (gpt2.intermediate_size, gpt2.hidden_act) == (192, "gelu_new")
    opt = parse("OPTForCausalLM", model_type="opt", ffn_dim=99, intermediate_size=None)
    assert (opt.intermediate_size, opt.hidden_act, opt.tie_word_embeddings) == (99, "relu", True)


def test_end_ids_of_generation_config_win(tmp_path: Path) -> None:
    raw = BASE | {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_k": 20}')
    config = ModelConfig.from_folder(tmp_path)
    assert config.eos_token_ids == (5, 6) and config.generation_config["top_k"] == 20


def test_a_stretched_rotary_embedding_takes_longer_texts() -> None:
    def length(**scaling: Any) -> int:
        return parse("LlamaForCausalLM", rope_scaling=scaling).max_context_len

    assert parse("LlamaForCausalLM").max_context_len == 256
    assert length(rope_type="linear", factor=4.0) == 1024
    assert length(rope_type="dynamic", factor=2.0) == 512
    assert length(rope_type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    assert length(rope_type="yarn", factor=4.0, original_max_position_embeddings=256) == 1024
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    assert length(rope_type="llama3", original_max_position_embeddings=64, **llama3) == 256


def test_salts_part_texts_that_are_rotated_differently() -> None:
    dynamic = parse("LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert [dynamic.rope_cache_salt(n) for n in (1, 256, 257, 300)] == [0, 0, 257, 300]
    assert dynamic.rope_restart_len(10) is None
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "type": "su"}
    long = parse("Phi3ForCausalLM", rope_scaling=factors, original_max_position_embeddings=100)
    assert [long.rope_cache_salt(n) for n in (100, 101, 200)] == [0, 1, 1]
    assert [long.rope_restart_len(n) for n in (10, 100, 101)] == [101, 101, None]
    assert parse("LlamaForCausalLM").rope_cache_salt(10**6) == 0


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelLoadError, match=r"'FooForCausalLM' is not supported.*OPTForCausalLM"):
        parse("FooForCausalLM")
