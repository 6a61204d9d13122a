"""Rotary embeddings (Su et al. 2021, arXiv:2104.09864) for every kind of context extension.

Inverse frequencies and attention factors follow `transformers.modeling_rope_utils`.

**Lengths.** Two kinds choose their frequencies by the length of the text: "dynamic" and "longrope".
Within the length that the model was made for they are constant. Beyond it the result is that of
`transformers.generate` for the one text alone, key-value cache included:

- A prompt is rotated by the frequencies of its whole length, even where it is computed in chunks.
- "dynamic": a generated token is rotated by the frequencies of the length at its time; keys that
  are in the cache keep the rotation they were made with.
- "longrope": when a text outgrows the original length, all of it is computed again with the long
  factors. The scheduler does that, as for a preempted request.

Hence pages of the cache are shared only among requests whose rotations agree: see
`ModelConfig.rope_cache_salt`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nbllm.config import RopeConfig
from nbllm_kernels import AttentionMetadata

_MAX_TABLE_BYTES = 256 * 1024**2  # what is longer is computed for the tokens of each step


class RotaryEmbedding:
    """Cosines and sines of one kind of layer.

    Args:
        rope: kind and parameters.
        num_positions: longest sequence.
        device: where the tables live.
    """

    def __init__(self, rope: RopeConfig, num_positions: int, device: torch.device) -> None:
        self._rope = rope
        self._num_positions = num_positions
        self._inv_freq, self._factor = _frequencies(rope)  # [1 or 2, rotary_dim / 2]
        self._inv_freq = self._inv_freq.to(device)
        self._table: Tensor | None = None
        num_rows = len(self._inv_freq) * num_positions
        if rope.rope_type != "dynamic" and num_rows * rope.rotary_dim * 4 <= _MAX_TABLE_BYTES:
            positions = torch.arange(num_positions, dtype=torch.float32, device=device)
            rows = [self._cos_sin(torch.outer(positions, row)) for row in self._inv_freq]
            self._table = torch.cat(rows)

    def rows(
        self, positions: Tensor, metadata: AttentionMetadata | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `nbllm_kernels.rotary` takes for these tokens.

        Args:
            positions: [num_tokens] int64.
            metadata: of the step; `prompt_lens` matters where the length does, None elsewhere.

        Returns:
            [num_rows, rotary_dim] float32, cosines then sines; [num_tokens] int64, a row each.
        """
        rope = self._rope
        if not rope.depends_on_length:
            if self._table is not None:
                return self._table, positions
            angles = positions[:, None] * self._inv_freq[0]
        elif rope.rope_type == "longrope":
            is_long = _text_lens(positions, metadata) > rope.original_max_position_embeddings
            if self._table is not None:
                return self._table, positions + is_long * self._num_positions
            angles = positions[:, None] * self._inv_freq[is_long.to(torch.int64)]
        else:
            lens = _text_lens(positions, metadata)
            angles = positions[:, None] * _dynamic_frequencies(rope, lens)
        return self._cos_sin(angles), torch.arange(len(positions), device=positions.device)

    def _cos_sin(self, angles: Tensor) -> Tensor:
        return torch.cat([angles.cos() * self._factor, angles.sin() * self._factor], dim=-1)


def _text_lens(positions: Tensor, metadata: AttentionMetadata | None) -> Tensor:
    """[num_tokens]: how long the text was when each token was first computed.

    Without `prompt_lens` every token is a generated one, of a text that ends with it.
    """
    if metadata is None or metadata.prompt_lens is None:
        return positions + 1
    counts = metadata.query_start_loc.diff()
    prompt_lens = metadata.prompt_lens.repeat_interleave(counts, output_size=len(positions))
    return torch.maximum(positions + 1, prompt_lens)


def _exponents(rope: RopeConfig) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


def _frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [1, rotary_dim / 2] (longrope [2, ...]), and the attention factor."""
    if rope.rope_type == "longrope":
        return _longrope(rope)
    inv_freq = 1.0 / rope.theta ** _exponents(rope)
    factor = 1.0
    if rope.rope_type == "linear":
        inv_freq = inv_freq / float(rope.parameters["factor"])
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.rope_type == "yarn":
        inv_freq, factor = _yarn(inv_freq, rope)
    return inv_freq[None], factor


def _dynamic_frequencies(rope: RopeConfig, lens: Tensor) -> Tensor:
    """NTK-aware scaling with a factor that grows with the text: [num_tokens, rotary_dim / 2]."""
    original, dim = rope.original_max_position_embeddings, rope.rotary_dim
    factor = float(rope.parameters["factor"])
    stretch = factor * lens.clamp(min=original) / original - (factor - 1)
    theta = rope.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta[:, None] ** _exponents(rope).to(lens.device)


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: stretch the long wavelengths, keep the short ones, blend in between."""
    parameters, original = rope.parameters, rope.original_max_position_embeddings
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    result = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    is_between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_between, blended, result)


def _yarn(inv_freq: Tensor, rope: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071)."""
    parameters, dim = rope.parameters, rope.rotary_dim
    original = rope.original_max_position_embeddings
    factor = float(parameters.get("factor") or rope.max_position_embeddings / original)

    def dimension_with(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_with(float(parameters.get("beta_fast") or 32))
    high = dimension_with(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    blended = inv_freq / factor * (1 - keep) + inv_freq * keep
    return blended, _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: dict[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)


def _longrope(rope: RopeConfig) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753), as Phi-3 uses it."""
    parameters, original = rope.parameters, rope.original_max_position_embeddings
    factors = [parameters["short_factor"], parameters["long_factor"]]
    inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta ** _exponents(rope))
    stretch = parameters.get("factor") or rope.max_position_embeddings / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        grown = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        attention_factor = grown
    return inv_freq, float(attention_factor)
