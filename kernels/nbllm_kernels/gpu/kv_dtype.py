"""The numbers in the KV cache: those of the model, or float8 (e4m3), half as many bytes.

An e4m3 number has three bits of mantissa and ends at 448. Larger keys and values are stored as
that; what is no number stays so, and is found when the token is sampled. To float16 two of them
are converted by one instruction, to bfloat16 by many, so products with them are taken in float16.

Source: FP8 formats for deep learning, Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_cache(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A key or value, in float32, as it is stored."""
    if dtype == tl.float8e4nv:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x.to(dtype)


@triton.jit
def to_operand(query: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The query, in the dtype in which products with a cache of `dtype` are taken."""
    if dtype == tl.float8e4nv:
        if query.dtype == tl.bfloat16:
            query = query.to(tl.float16)
    return query
