"""Logits as the sampler sees them: divided by the temperature, and in the order of integers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_logits(
    logits_ptr: tl.tensor, ids: tl.tensor, temperature: tl.tensor, VOCAB_SIZE: tl.constexpr
) -> tl.tensor:
    """logits / temperature (as they are where it is 0); NaN and what lies past the end: -inf."""
    x = tl.load(logits_ptr + ids, mask=ids < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    divisor = tl.where(temperature == 0.0, 1.0, temperature)
    # Adding zero makes -0 a 0, which equals it but has other bits.
    return tl.div_rn(x, tl.zeros_like(x) + divisor) + 0.0


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """An int32 for each float32 that orders like it."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(key: tl.tensor) -> tl.tensor:
    """The float32 that has an order key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
