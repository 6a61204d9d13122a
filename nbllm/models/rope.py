"""Tables of cosines and sines for rotary embeddings, for every kind of context extension.

Inverse frequencies and attention factors follow `transformers.modeling_rope_utils`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nbllm.config import RopeConfig


def cos_sin_cache(rope: RopeConfig, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, rotary_dim] float32: the cosines, then the sines, of every position.

    "dynamic" and "longrope" choose their frequencies by the length of the text; here the length is
    `num_positions`, the longest that the engine allows, so that cached keys stay valid while a text
    grows. Up to the original length of the model nothing is stretched.
    """
    inv_freq, factor = _frequencies(rope, num_positions)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq)
    table = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)
    return table.to(device)


def _frequencies(rope: RopeConfig, num_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] and the factor of cosines and sines."""
    parameters, dim, theta = rope.parameters, rope.rotary_dim, rope.theta
    original = int(parameters["original_max_position_embeddings"])
    if rope.rope_type == "dynamic":
        stretch = float(parameters["factor"])
        length = max(num_positions, original)
        theta *= (stretch * length / original - (stretch - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inv_freq = 1.0 / theta**exponents
    if rope.rope_type == "linear":
        return inv_freq / float(parameters["factor"]), 1.0
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, parameters, original), 1.0
    if rope.rope_type == "yarn":
        return _yarn(inv_freq, rope, original)
    if rope.rope_type == "longrope":
        return _longrope(inv_freq, rope, num_positions, original)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, parameters: dict[str, float], original: int) -> Tensor:
    """Llama 3.1: stretch the long wavelengths, keep the short ones, blend in between."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    result = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    is_between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_between, blended, result)


def _yarn(inv_freq: Tensor, rope: RopeConfig, original: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071)."""
    parameters, dim = rope.parameters, rope.rotary_dim
    factor = float(parameters["factor"])

    def dimension_with(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_with(float(parameters.get("beta_fast") or 32))
    high = dimension_with(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    blended = inv_freq / factor * (1 - keep) + inv_freq * keep

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        else:
            attention_factor = magnitude(factor)
    return blended, float(attention_factor)


def _longrope(
    inv_freq: Tensor, rope: RopeConfig, num_positions: int, original: int
) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753), as Phi-3 uses it."""
    parameters = rope.parameters
    name = "long_factor" if num_positions > original else "short_factor"
    factors = torch.tensor(parameters[name], dtype=torch.float32)
    stretch = parameters.get("factor") or rope.max_position_embeddings / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        grown = math.sqrt(1 + math.log(stretch) / math.log(original))
        attention_factor = grown if stretch > 1 else 1.0
    return inv_freq / factors, float(attention_factor)
