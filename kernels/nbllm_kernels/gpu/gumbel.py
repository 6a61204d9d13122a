"""Gumbel noise inside a kernel: the same function as `nbllm_kernels.gumbel`."""

from __future__ import annotations

import triton
import triton.language as tl

from nbllm_kernels import gumbel

_MIX_1 = tl.constexpr(gumbel.MIX_1)
_MIX_2 = tl.constexpr(gumbel.MIX_2)
_SALT_POSITION = tl.constexpr(gumbel.SALT_POSITION)
_SALT_SEED = tl.constexpr(gumbel.SALT_SEED)
_UNIT = tl.constexpr(gumbel.UNIT)
_LARGEST_W = tl.constexpr(gumbel.LARGEST_W)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x ^= x >> 16
    x *= tl.full(x.shape, _MIX_1, tl.uint32)
    x ^= x >> 15
    x *= tl.full(x.shape, _MIX_2, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def noise_keys(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Two uint32 keys of each row; seed and position are blocks of int64."""
    salt = tl.full(position.shape, _SALT_POSITION, tl.int64)
    position_key = _mix((position + salt).to(tl.uint32))
    key_0 = _mix(seed.to(tl.uint32) ^ position_key)
    inner = _mix(key_0 + tl.full(key_0.shape, _SALT_SEED, tl.uint32))
    key_1 = _mix((seed >> 32).to(tl.uint32) ^ inner)
    return key_0, key_1


@triton.jit
def row_noise_keys(seeds_ptr: tl.tensor, positions_ptr: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The keys of one row, blocks of one."""
    zero = tl.zeros((1,), dtype=tl.int64)
    return noise_keys(zero + tl.load(seeds_ptr + row), zero + tl.load(positions_ptr + row))


@triton.jit
def hash_ids(ids: tl.tensor, key_0: tl.tensor, key_1: tl.tensor) -> tl.tensor:
    """The 32-bit hash of each of a block of ids (int32)."""
    return _mix(_mix(ids.to(tl.uint32) + key_0) ^ key_1)


@triton.jit
def gumbel_noise(ids: tl.tensor, key_0: tl.tensor, key_1: tl.tensor) -> tl.tensor:
    """float32 noise of a block of ids (int32)."""
    w = (hash_ids(ids, key_0, key_1) >> 1).to(tl.int32).to(tl.float32)
    w = tl.minimum((w + 0.5) * _UNIT, _LARGEST_W)
    return -tl.log(-_log1p_minus(w))


@triton.jit
def _log1p_minus(w: tl.tensor) -> tl.tensor:
    """log(1 - w) for 0 < w < 1, to a relative error of about 3e-7.

    The hardware's logarithm has an absolute error only near one, so that there the series of
    2 artanh(s), s = -w / (2 - w), takes over. From a half on, 1 - w is exact.
    """
    s = -w / (2.0 - w)
    t = s * s
    series = 1.0 / 15.0 + t * (1.0 / 17.0)
    series = 1.0 / 13.0 + t * series
    series = 1.0 / 11.0 + t * series
    series = 1.0 / 9.0 + t * series
    series = 1.0 / 7.0 + t * series
    series = 1.0 / 5.0 + t * series
    series = 1.0 / 3.0 + t * series
    series = 2.0 * s * (1.0 + t * series)
    return tl.where(w < 0.5, series, tl.log(1.0 - w))
