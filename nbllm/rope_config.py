"""rope_scaling or rope_parameters of a config.json -> RopeConfig."""

from __future__ import annotations

from typing import Any

from nbllm.config import RopeConfig
from nbllm.config_numbers import positive, positive_float

Raw = dict[str, Any]


def read_rope(parameters: Raw, raw: Raw, fields: Raw) -> RopeConfig:
    """The rotary embedding of one kind of layer.

    Args:
        parameters: rope_parameters or rope_scaling of that kind.
        raw: config.json.
        fields: of `ModelConfig`, as far as they are known.

    Raises:
        KeyError, ValueError, TypeError: a number is missing, or makes no sense.
    """
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
        theta=positive_float(
            parameters.get("rope_theta", raw.get("rope_theta")) or 1e4, "rope_theta"
        ),
        rotary_dim=int(fields["head_dim"] * positive_float(partial, "partial_rotary_factor")),
        max_position_embeddings=max_positions,
        original_max_position_embeddings=positive(original, "max_position_embeddings"),
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
        positive_float(rope.parameters[name], name)
    optional = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    for name in optional:
        if rope.parameters.get(name):
            positive_float(rope.parameters[name], name)
    if rope.rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = rope.parameters[name]
            if not isinstance(factors, list) or len(factors) != rope.rotary_dim // 2:
                raise ValueError(f"{name} must be a list of {rope.rotary_dim // 2} numbers")
            for factor in factors:
                positive_float(factor, name)
