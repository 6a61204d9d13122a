"""SamplingTensors: how each row of a step is sampled, as the sampling kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class SamplingTensors:
    """One entry per row of logits, on the device of the logits.

    Attributes:
        temperature: [N] float32; 0 is greedy.
        top_k: [N] int32; 0 is off.
        top_p: [N] float32; 1 is off.
        min_p: [N] float32; 0 is off.
        seeds: [N] int64.
        positions: [N] int64, position in the sequence of the token to be sampled.
        all_greedy: every temperature is 0.
        any_filter: some row uses top_k, top_p or min_p.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    all_greedy: bool
    any_filter: bool
