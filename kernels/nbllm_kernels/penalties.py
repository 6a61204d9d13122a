"""Penalties: logits of ids that occurred already are lowered, by tables that live on the device.

Repetition penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1, over prompt and output;
frequency and presence penalties as in OpenAI's API, over the output alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nbllm_kernels import reference
from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.reference import MAX_COUNT, PROMPT_FLAG


@dataclass(slots=True)
class Penalties:
    """Tables with a row for each running sequence.

    Attributes:
        occurrences: [num_rows, vocab_size] int16: in the low 15 bits how often an id was generated,
            `MAX_COUNT` at most; the highest bit is set if it stands in the prompt.
        presence: [num_rows] float32, subtracted once if the id was generated.
        frequency: [num_rows] float32, subtracted for every time that it was.
        repetition: [num_rows] float32, > 0; divides positive logits and multiplies negative ones
            of ids that occurred anywhere.
    """

    occurrences: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor


def apply_penalties(logits: Tensor, rows: Tensor, penalties: Penalties) -> Tensor:
    """Lower the logits of ids that occurred already: repetition, then frequency, then presence.

    Args:
        logits: [N, vocab_size], of a floating-point dtype; left as they are.
        rows: [N] int64, rows of the tables.
        penalties: the tables.

    Returns:
        [N, vocab_size] float32.
    """
    if runs_triton(logits):
        from nbllm_kernels.gpu import penalties as gpu

        return gpu.apply_penalties(logits, rows, penalties)
    return reference.apply_penalties(logits, rows, penalties)


def count_tokens(penalties: Penalties, rows: Tensor, token_ids: Tensor) -> None:
    """Book generated tokens.

    Args:
        penalties: the tables, changed.
        rows: [N] int64, each at most once except for one that belongs to nobody.
        token_ids: [N] int64; negative ones are not counted.
    """
    if runs_triton(rows):
        from nbllm_kernels.gpu import penalties as gpu

        gpu.count_tokens(penalties, rows, token_ids)
        return
    reference.count_tokens(penalties, rows, token_ids)


__all__ = ["MAX_COUNT", "PROMPT_FLAG", "Penalties", "apply_penalties", "count_tokens"]
