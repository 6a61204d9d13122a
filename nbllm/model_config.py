"""config.json -> ModelConfig, for every architecture that nbllm knows.

Both spellings of the files are read: those of transformers 4 (`torch_dtype`, `rope_theta`,
`rope_scaling`) and of transformers 5 (`dtype`, `rope_parameters`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nbllm.config import ModelConfig, RopeConfig
from nbllm.errors import ModelLoadError

Raw = dict[str, Any]

_DECODER = {  # architecture -> what sets it apart from Llama
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


def read_model_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration; errors as in `ModelConfig`."""
    raw = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_model_config(raw, _read_json(generation) if generation.is_file() else {})


def parse_model_config(raw: Raw, generation_config: Raw) -> ModelConfig:
    """The same from dicts."""
    architectures = raw.get("architectures") or []
    architecture = architectures[0] if architectures else None
    known = [*_DECODER, *_OTHER]
    if architecture not in known:
        raise ModelLoadError(
            f"config.json: architecture {architecture!r} is not supported; supported are "
            f"{', '.join(known)}"
        )
    try:
        fields = _common_fields(raw, generation_config)
        if architecture in _DECODER:
            fields |= _DECODER[architecture]  # type: ignore[call-overload]
            fields |= _decoder_fields(raw, architecture, fields)
        else:
            fields |= {"layer_windows": (None,) * fields["num_layers"]}
        return ModelConfig(
            architecture=architecture, generation_config=generation_config, raw=raw, **fields
        )
    except KeyError as error:
        raise ModelLoadError(f"config.json: {error} is missing") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelLoadError(f"config.json makes no sense: {error}") from error


def _read_json(path: Path) -> Raw:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path.name} is missing in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path.name}: expected a JSON object")
    return content


def _common_fields(raw: Raw, generation_config: Raw) -> Raw:
    def first(*names: str) -> Any:
        for name in names:
            if raw.get(name) is not None:
                return raw[name]
        raise KeyError(names[0])

    hidden_size = _positive(first("hidden_size", "n_embd"), "hidden_size")
    num_heads = _positive(first("num_attention_heads", "n_head"), "num_attention_heads")
    inner = raw.get("intermediate_size") or raw.get("ffn_dim") or raw.get("n_inner")
    eos = generation_config.get("eos_token_id", raw.get("eos_token_id"))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return {
        "model_type": str(raw.get("model_type", "")),
        "vocab_size": _positive(raw["vocab_size"], "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _positive(inner or 4 * hidden_size, "intermediate_size"),
        "num_layers": _positive(first("num_hidden_layers", "n_layer"), "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _positive(raw.get("num_key_value_heads") or num_heads, "kv heads"),
        "head_dim": _positive(raw.get("head_dim") or hidden_size // num_heads, "head_dim"),
        "max_position_embeddings": _positive(
            first("max_position_embeddings", "n_positions"), "max_position_embeddings"
        ),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", _ties_by_default(raw))),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "bos_token_id": raw.get("bos_token_id"),
        "hidden_act": str(
            raw.get("hidden_activation")
            or raw.get("hidden_act")
            or raw.get("activation_function", "silu")
        ),
    }


def _ties_by_default(raw: Raw) -> bool:
    # What the configuration classes of transformers assume when the file does not say.
    return raw.get("model_type") in ("gemma2", "gemma3_text", "gpt2", "opt", "smollm3")


def _decoder_fields(raw: Raw, architecture: str, fields: Raw) -> Raw:
    num_heads, num_kv_heads = fields["num_heads"], fields["num_kv_heads"]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads can't share {num_kv_heads} key-value heads")
    result: Raw = {
        "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
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
            "attention_scale": float(scalar) ** -0.5,
            "attention_softcap": raw.get("attn_logit_softcapping"),
            "final_softcap": raw.get("final_logit_softcapping"),
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
        return tuple(rope if flag else None for flag in has_rope)
    return (rope,) * num_layers


def _rope(parameters: Raw, raw: Raw, fields: Raw) -> RopeConfig:
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    known = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")
    if rope_type not in known:
        raise ValueError(f"rope_type {rope_type!r} is not supported")
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    return RopeConfig(
        rope_type="longrope" if rope_type == "su" else rope_type,
        theta=float(parameters.get("rope_theta", raw.get("rope_theta")) or 1e4),
        rotary_dim=int(fields["head_dim"] * partial),
        max_position_embeddings=fields["max_position_embeddings"],
        parameters=dict(parameters)
        | {
            "original_max_position_embeddings": parameters.get("original_max_position_embeddings")
            or raw.get("original_max_position_embeddings")
            or fields["max_position_embeddings"]
        },
    )


def _positive(value: Any, name: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(f"{name} is {value}")
    return number
