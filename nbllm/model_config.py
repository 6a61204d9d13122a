"""config.json -> ModelConfig, for every architecture that nbllm knows.

Both spellings of the files are read: those of transformers 4 (`torch_dtype`, `rope_theta`,
`rope_scaling`) and of transformers 5 (`dtype`, `rope_parameters`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbllm.config import ModelConfig, RopeConfig
from nbllm.config_numbers import optional_float, positive, positive_float, short
from nbllm.errors import ModelLoadError
from nbllm.model_files import has_file, read_json
from nbllm.pooling_files import read_pooling
from nbllm.rope_config import read_rope

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
_ENCODER = tuple(
    f"{family}{kind}"
    for family in ("Bert", "Roberta", "XLMRoberta", "ModernBert")
    for kind in ("Model", "ForMaskedLM")
)


def read_model_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration; errors as in `ModelConfig`."""
    raw = read_json(folder, "config.json")
    name = "generation_config.json"
    generation_config = read_json(folder, name) if has_file(folder, name) else {}
    config = parse_model_config(raw, generation_config)
    return replace(config, **read_pooling(folder, is_encoder=config.is_encoder))


def parse_model_config(raw: Raw, generation_config: Raw) -> ModelConfig:
    """The same from dicts."""
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    known = [*_DECODER, *_OTHER, *_ENCODER]
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
        elif architecture in _ENCODER:
            fields |= _encoder_fields(raw, architecture, fields)
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

    hidden_size = positive(first("hidden_size", "n_embd"), "hidden_size")
    num_heads = positive(first("num_attention_heads", "n_head"), "num_attention_heads")
    inner = raw.get("ffn_dim") or raw.get("n_inner") or raw.get("intermediate_size")
    kv_heads = raw.get("num_key_value_heads") or num_heads
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    vocab_size = positive(raw["vocab_size"], "vocab_size")
    activation = raw.get("hidden_activation") or raw.get("hidden_act")
    return {
        "model_type": str(raw.get("model_type", "")),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": positive(inner or 4 * hidden_size, "intermediate_size"),
        "num_layers": positive(first("num_hidden_layers", "n_layer"), "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": positive(kv_heads, "num_key_value_heads"),
        "head_dim": positive(raw.get("head_dim") or hidden_size // num_heads, "head_dim"),
        "max_position_embeddings": positive(
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
    positive(raw.get("word_embed_proj_dim") or fields["hidden_size"], "word_embed_proj_dim")
    positive_float(raw.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon")
    default = "gelu_new" if raw.get("model_type") == "gpt2" else "relu"
    return {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["hidden_size"] // fields["num_heads"],
        "hidden_act": str(raw.get("activation_function") or default),
        "layer_windows": (None,) * fields["num_layers"],
    }


def _encoder_fields(raw: Raw, architecture: str, fields: Raw) -> Raw:
    num_layers, num_heads = fields["num_layers"], fields["num_heads"]
    if fields["hidden_size"] % num_heads:
        raise ValueError(f"{num_heads} heads don't divide {fields['hidden_size']}")
    head_dim = fields["hidden_size"] // num_heads
    result: Raw = {
        "is_encoder": True,
        "pooling": "cls",
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "layer_windows": (None,) * num_layers,
    }
    if architecture.startswith("ModernBert"):
        positive_float(raw.get("norm_eps", 1e-5), "norm_eps")
        result |= {
            "hidden_act": str(raw.get("hidden_activation") or "gelu"),
            "attention_bias": bool(raw.get("attention_bias", False)),
            "mlp_bias": bool(raw.get("mlp_bias", False)),
        }
        return result | _modernbert_layers(raw, fields | result)
    if raw.get("is_decoder") or raw.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError("only encoders with absolute positions are supported")
    positive_float(raw.get("layer_norm_eps", 1e-12), "layer_norm_eps")
    positive(raw.get("type_vocab_size", 2), "type_vocab_size")
    offset = 0
    if not architecture.startswith("Bert"):
        padding = raw.get("pad_token_id", 1)
        if type(padding) is not int or not 0 <= padding < fields["max_position_embeddings"] - 1:
            raise ValueError(f"pad_token_id is {short(padding)}, and positions begin behind it")
        offset = padding + 1
    return result | {"hidden_act": str(raw.get("hidden_act") or "gelu"), "position_offset": offset}


def _modernbert_layers(raw: Raw, fields: Raw) -> Raw:
    """Every third layer sees the whole text, the others so many tokens on either side."""
    num_layers = fields["num_layers"]
    kinds = raw.get("layer_types")
    if kinds is None:
        interval = positive(raw.get("global_attn_every_n_layers", 3), "global_attn_every_n_layers")
        names = ("full_attention", "sliding_attention")
        kinds = [names[i % interval != 0] for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ValueError(f"{len(kinds)} layer_types for {num_layers} layers")
    window = positive(raw.get("local_attention", 128), "local_attention") // 2
    parameters = raw.get("rope_parameters") or {}
    ropes = {}
    for kind, old, default in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        given = {"rope_theta": raw.get(old) or default} | (parameters.get(kind) or {})
        ropes[kind] = read_rope(given, raw, fields)
        if ropes[kind].depends_on_length:
            raise ValueError(f"rope_type {ropes[kind].rope_type!r} is not supported in encoders")
    return {
        "layer_windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
        "layer_ropes": tuple(ropes[kind] for kind in kinds),
    }


def _decoder_fields(raw: Raw, architecture: str, fields: Raw) -> Raw:
    num_heads, num_kv_heads = fields["num_heads"], fields["num_kv_heads"]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads can't share {num_kv_heads} key-value heads")
    result: Raw = {
        "rms_norm_eps": positive_float(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
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
            "attention_scale": positive_float(scalar, "query_pre_attn_scalar") ** -0.5,
            "attention_softcap": optional_float(raw, "attn_logit_softcapping"),
            "final_softcap": optional_float(raw, "final_logit_softcapping"),
        }
    return result


def _layer_windows(raw: Raw, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if window is None or raw.get("use_sliding_window") is False:
        return (None,) * num_layers
    window = positive(window, "sliding_window")
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
        ropes = {True: read_rope(local, raw, fields), False: read_rope(full, raw, fields)}
        return tuple(ropes[window is not None] for window in windows)
    if not parameters:
        parameters = {"rope_theta": raw.get("rope_theta", 1e4)} | (raw.get("rope_scaling") or {})
    rope = read_rope(parameters, raw, fields)
    if architecture == "SmolLM3ForCausalLM":
        has_rope = raw.get("no_rope_layers")  # 1 where there IS a rotary embedding
        if has_rope is None:
            interval = int(raw.get("no_rope_layer_interval", 4))
            has_rope = [int((i + 1) % interval != 0) for i in range(num_layers)]
        if len(has_rope) != num_layers:
            raise ValueError(f"{len(has_rope)} no_rope_layers for {num_layers} layers")
        return tuple(rope if flag else None for flag in has_rope)
    return (rope,) * num_layers
