"""Gumbel noise as a pure function of (seed, position, token id).

    h = hash(seed, position, id), 32 bits
    w = min((h >> 1) + 0.5, 2^31 - 2^7) / 2^31     in (0, 1)
    noise = -log(-log(1 - w))

1 - w is the uniform number. It is never formed: the largest noises, which decide the draw, come
from the smallest w, where float32 is finest. Taking log of a 24-bit uniform number near one would
make one id in 2^24 infinitely likely, which at a vocabulary of 150,000 is one token in a hundred.

The mixing function is "lowbias32" (C. Wellons, hash-prospector, 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbllm_kernels import cpu_native

MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
SALT_POSITION, SALT_SEED = 0x9E3779B9, 0x85EBCA6B
UNIT = 2.0**-31
LARGEST_W = 1.0 - 2.0**-24
_CHUNK = 32_768  # ids at a time: the work stays in a core's cache, which makes it 4x as fast


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """[N, vocab_size] float32 of independent standard Gumbel numbers.

    Args:
        seeds: [N] int64.
        positions: [N] int64.
        vocab_size: ids 0 .. vocab_size - 1.
    """
    if cpu_native.takes_seeds(seeds, positions):
        return _noise_of(cpu_native.negative_w(seeds, positions, vocab_size))
    key_0, key_1 = _noise_keys(seeds, positions)
    ids = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    if seeds.device.type != "cpu":
        return _noise_of(_negative_w(ids.repeat(len(seeds), 1), key_0[:, None], key_1[:, None]))
    noise = torch.empty(len(seeds), vocab_size)
    for row, key_a, key_b in zip(noise, key_0.tolist(), key_1.tolist(), strict=True):
        for chunk, out in zip(ids.split(_CHUNK), row.split(_CHUNK), strict=True):
            out.copy_(_noise_of(_negative_w(chunk.clone(), key_a, key_b)))
    return noise


def gumbel_noise_of_ids(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """[N, M] float32: the same for some ids of each row, [N, M] int64."""
    if cpu_native.takes_seeds(seeds, positions):
        return _noise_of(cpu_native.negative_w(seeds, positions, ids))
    key_0, key_1 = _noise_keys(seeds, positions)
    return _noise_of(_negative_w(ids.to(torch.int32), key_0[:, None], key_1[:, None]))


def _noise_of(negative_w: Tensor) -> Tensor:
    """Standard Gumbel numbers, in place."""
    return negative_w.log1p_().neg_().log_().neg_()


def _noise_keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 keys per row, from which the noise of any id follows."""
    position_key = _mix_(_low_32(positions + SALT_POSITION))
    key_0 = _mix_(_low_32(seeds) ^ position_key)
    key_1 = _mix_(_low_32(seeds >> 32) ^ _mix_(key_0 + _signed(SALT_SEED)))
    return key_0, key_1


def _negative_w(ids: Tensor, key_0: Tensor | int, key_1: Tensor | int) -> Tensor:
    """-w of each id, float32; int32 (overwritten) stands for uint32 throughout."""
    scratch = torch.empty_like(ids)
    ids += key_0
    _mix_(ids, scratch)
    ids ^= key_1
    _mix_(ids, scratch)
    ids >>= 1  # the sign comes in from the left ...
    ids &= 0x7FFFFFFF  # ... and goes
    negative_w = ids.to(torch.float32)
    negative_w += 0.5
    negative_w *= -UNIT
    return negative_w.clamp_(min=-LARGEST_W)


def _mix_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """A bijective hash of 32 bits, in place."""
    scratch = torch.empty_like(x) if scratch is None else scratch
    x ^= _shift_right(x, 16, scratch)
    x *= _signed(MIX_1)
    x ^= _shift_right(x, 15, scratch)
    x *= _signed(MIX_2)
    x ^= _shift_right(x, 16, scratch)
    return x


def _shift_right(x: Tensor, bits: int, out: Tensor) -> Tensor:
    torch.bitwise_right_shift(x, bits, out=out)  # arithmetic: the sign comes in from the left
    out &= (1 << (32 - bits)) - 1
    return out


def _low_32(x: Tensor) -> Tensor:
    low = x & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant
