"""config.json -> ModelConfig, for every architecture that nbllm knows.

Both spellings of the files are read: those of transformers 4 (`torch_dtype`, `rope_theta`,
`rope_scaling`) and of transformers 5 (`dtype`, `rope_parameters`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nbllm.config import ModelConfig, RopeConfig
from nbllm.errors import ModelLoadError
from nbllm.model_files import has_file, read_json

Raw = dict[str, Any]

_DECODER: dict[str, Raw] = {  # architecture -> what sets it apart from Llama
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": "head"},
    "Phi3ForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "Olmo2ForCausalLM": {"qk_norm": "full", "norm_placement": "post"},
    "Gemma2ForCausalLM": {"norm_placement": "both", "norm_offset": 1.0},
    "Gemma3ForCausalLM": {"norm_placement": "both", "norm_offset": 1.0, "qk_norm": "head"},
}
_OTHER = ("OPTForCausalLM", "GPT2LMHeadModel")

# Far beyond any model there is: what is larger is an error or an attack, and must not come to the
# point where memory is allocated or layers are counted.
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**26,
    "word_embed_proj_dim": 2**18,
    "sliding_window": 2**62,
}


def read_model_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration; errors as in `ModelConfig`."""
    raw = read_json(folder, "config.json")
    name = "generation_config.json"
    return parse_model_config(raw, read_json(folder, name) if has_file(folder, name) else {})


def parse_model_config(raw: Raw, generation_config: Raw) -> ModelConfig:
    """The same from dicts."""
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    known = [*_DECODER, *_OTHER]
    if not isinstance(architecture, str) or architecture not in known:
        raise ModelLoadError(
            f"config.json: architecture {architecture!r} is not supported; supported are "
            f"{', '.join(known)}"
        )
    if raw.get("quantization_config") is not None:
        raise ModelLoadError("config.json: quantization_config: quantized weights can't be read")
    try:
        fields = _common_fields(raw, generation_config)
        if architecture in _DECODER:
            fields |= _DECODER[architecture]
            fields |= _decoder_fields(raw, architecture, fields)
        else:
            fields |= _other_fields(raw, fields)
        return ModelConfig(
            architecture=architecture, generation_config=generation_config, raw=raw, **fields
        )
    except KeyError as error:
        raise ModelLoadError(f"config.json: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelLoadError(f"config.json makes no sense: {error}") from error


def _common_fields(raw: Raw, generation_config: Raw) -> Raw:
    def first(*names: str) -> Any:
        for name in names:
            if raw.get(name) is not None:
                return raw[name]
        raise KeyError(names[0])

    hidden_size = _positive(first("hidden_size", "n_embd"), "hidden_size")
    num_heads = _positive(first("num_attention_heads", "n_head"), "num_attention_heads")
    inner = raw.get("ffn_dim") or raw.get("n_inner") or raw.get("intermediate_size")
    kv_heads = raw.get("num_key_value_heads") or num_heads
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    vocab_size = _positive(raw["vocab_size"], "vocab_size")
    activation = raw.get("hidden_activation") or raw.get("hidden_act")
    return {
        "model_type": str(raw.get("model_type", "")),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _positive(inner or 4 * hidden_size, "intermediate_size"),
        "num_layers": _positive(first("num_hidden_layers", "n_layer"), "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _positive(kv_heads, "num_key_value_heads"),
        "head_dim": _positive(raw.get("head_dim") or hidden_size // num_heads, "head_dim"),
        "max_position_embeddings": _positive(
            first("max_position_embeddings", "n_positions"), "max_position_embeddings"
        ),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", _ties_by_default(raw))),
        "eos_token_ids": _eos_token_ids(raw, generation_config, vocab_size),
        "bos_token_id": raw.get("bos_token_id"),
        "hidden_act": str(activation or raw.get("activation_function") or "silu"),
    }


def _eos_token_ids(raw: Raw, generation_config: Raw, vocab_size: int) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    for content, file in ((raw, "config.json"), (generation_config, "generation_config.json")):
        eos = content.get("eos_token_id")
        if eos is None:
            continue
        found = tuple(eos) if isinstance(eos, list) else (eos,)  # the latter file wins
        for token_id in found:
            # Used as an index into the logits.
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ModelLoadError(f"{file}: eos_token_id {token_id!r} is not in the vocabulary")
    return found


def _ties_by_default(raw: Raw) -> bool:
    # What the configuration classes of transformers assume when the file does not say.
    return raw.get("model_type") in ("gemma2", "gemma3_text", "gpt2", "opt", "smollm3")


def _other_fields(raw: Raw, fields: Raw) -> Raw:
    if fields["hidden_size"] % fields["num_heads"]:
        raise ValueError(f"{fields['num_heads']} heads don't divide {fields['hidden_size']}")
    _positive(raw.get("word_embed_proj_dim") or fields["hidden_size"], "word_embed_proj_dim")
    _positive_float(raw.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon")
    default = "gelu_new" if raw.get("model_type") == "gpt2" else "relu"
    return {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["hidden_size"] // fields["num_heads"],
        "hidden_act": str(raw.get("activation_function") or default),
        "layer_windows": (None,) * fields["num_layers"],
    }


def _decoder_fields(raw: Raw, architecture: str, fields: Raw) -> Raw:
    num_heads, num_kv_heads = fields["num_heads"], fields["num_kv_heads"]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads can't share {num_kv_heads} key-value heads")
    result: Raw = {
        "rms_norm_eps": _positive_float(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        "attention_bias": bool(raw.get("attention_bias", fields.get("attention_bias", False))),
        "output_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "layer_windows": _layer_windows(raw, architecture, fields["num_layers"]),
        "layer_ropes": _layer_ropes(raw, architecture, fields),
    }
    if architecture == "Qwen2ForCausalLM":
        result["attention_bias"], result["output_bias"] = True, False
    if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        scalar = raw.get("query_pre_attn_scalar") or 256
        result |= {
            "embedding_scale": math.sqrt(fields["hidden_size"]),
            "attention_scale": _positive_float(scalar, "query_pre_attn_scalar") ** -0.5,
            "attention_softcap": _optional_float(raw, "attn_logit_softcapping"),
            "final_softcap": _optional_float(raw, "final_logit_softcapping"),
        }
    return result


def _layer_windows(raw: Raw, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if window is None or raw.get("use_sliding_window") is False:
        return (None,) * num_layers
    window = _positive(window, "sliding_window")
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers:
            raise ValueError(f"{len(layer_types)} layer_types for {num_layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if architecture == "Gemma2ForCausalLM":
        return tuple(window if i % 2 == 0 else None for i in range(num_layers))
    if architecture == "Gemma3ForCausalLM":
        pattern = int(raw.get("sliding_window_pattern", 6))
        return tuple(window if (i + 1) % pattern else None for i in range(num_layers))
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        if not raw.get("use_sliding_window", False):
            return (None,) * num_layers
        first = int(raw.get("max_window_layers", 0))
        return tuple(window if i >= first else None for i in range(num_layers))
    if architecture in ("MistralForCausalLM", "Phi3ForCausalLM"):
        return (window,) * num_layers
    return (None,) * num_layers


def _layer_ropes(raw: Raw, architecture: str, fields: Raw) -> tuple[RopeConfig | None, ...]:
    num_layers = fields["num_layers"]
    parameters = raw.get("rope_parameters") or {}
    if architecture == "Gemma3ForCausalLM":
        windows = _layer_windows(raw, architecture, num_layers)
        if "full_attention" in parameters:  # transformers 5: one dict per kind of layer
            full, local = parameters["full_attention"], parameters["sliding_attention"]
        else:
            full = {"rope_theta": raw.get("rope_theta", 1e6)} | (raw.get("rope_scaling") or {})
            local = {"rope_theta": raw.get("rope_local_base_freq", 1e4)}
        ropes = {True: _rope(local, raw, fields), False: _rope(full, raw, fields)}
        return tuple(ropes[window is not None] for window in windows)
    if not parameters:
        parameters = {"rope_theta": raw.get("rope_theta", 1e4)} | (raw.get("rope_scaling") or {})
    rope = _rope(parameters, raw, fields)
    if architecture == "SmolLM3ForCausalLM":
        has_rope = raw.get("no_rope_layers")  # 1 where there IS a rotary embedding
        if has_rope is None:
            interval = int(raw.get("no_rope_layer_interval", 4))
            has_rope = [int((i + 1) % interval != 0) for i in range(num_layers)]
        if len(has_rope) != num_layers:
            raise ValueError(f"{len(has_rope)} no_rope_layers for {num_layers} layers")
        return tuple(rope if flag else None for flag in has_rope)
    return (rope,) * num_layers


def _rope(parameters: Raw, raw: Raw, fields: Raw) -> RopeConfig:
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    rope_type = {"su": "longrope"}.get(rope_type, rope_type)
    max_positions = fields["max_position_embeddings"]
    original = max_positions
    if rope_type != "dynamic":  # which stretches from what the model as a whole is made for
        original = (
            parameters.get("original_max_position_embeddings")
            or raw.get("original_max_position_embeddings")
            or max_positions
        )
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    rope = RopeConfig(
        rope_type=rope_type,
        theta=_positive_float(
            parameters.get("rope_theta", raw.get("rope_theta")) or 1e4, "rope_theta"
        ),
        rotary_dim=int(fields["head_dim"] * _positive_float(partial, "partial_rotary_factor")),
        max_position_embeddings=max_positions,
        original_max_position_embeddings=_positive(original, "max_position_embeddings"),
        parameters=dict(parameters),
    )
    _check_rope(rope, fields["head_dim"])
    return rope


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    """Everything that `nbllm.models.rope` computes with must be there and be a number."""
    required: dict[str, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (),
        "longrope": (),
    }
    if rope.rope_type not in required:
        raise ValueError(f"rope_type {rope.rope_type!r} is not supported")
    if not 2 < rope.rotary_dim <= head_dim or rope.rotary_dim % 2:
        raise ValueError(f"{rope.rotary_dim} of {head_dim} dimensions of a head can't be rotated")
    if rope.theta <= 1 or rope.original_max_position_embeddings < 2:
        raise ValueError(f"rope_theta {rope.theta} or the original length is too small")
    for name in required[rope.rope_type]:
        _positive_float(rope.parameters[name], name)
    optional = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    for name in optional:
        if rope.parameters.get(name):
            _positive_float(rope.parameters[name], name)
    if rope.rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = rope.parameters[name]
            if not isinstance(factors, list) or len(factors) != rope.rotary_dim // 2:
                raise ValueError(f"{name} must be a list of {rope.rotary_dim // 2} numbers")
            for factor in factors:
                _positive_float(factor, name)


def _positive(value: Any, name: str) -> int:
    """An integer from 1 to the limit of its name."""
    if type(value) is not int or not 1 <= value <= _LIMITS[name]:
        raise ValueError(f"{name} is {_short(value)}, not an integer in [1, {_LIMITS[name]}]")
    return value


def _positive_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {_short(value)}, not a number")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {_short(value)}, not a positive number")
    return float(value)


def _optional_float(raw: Raw, name: str) -> float | None:
    return None if raw.get(name) is None else _positive_float(raw[name], name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
