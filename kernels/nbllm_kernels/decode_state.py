"""The state of decoding sequences on the device, and the ops that close its loop.

    start_rows         a new sequence -> state
    decode_inputs      state -> what the next step computes
    append_tokens      sampled tokens -> state, and a table that the host reads later
    fill_last_tokens   state -> the inputs of a step that the host put together

Between the second and the third stand the model and the sampler. None of these four asks the host
for anything, so a captured graph of them can be replayed several times in a row: a sequence that
comes to its end marks itself and is passed over from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nbllm_kernels import reference
from nbllm_kernels.dispatch import runs_triton
from nbllm_kernels.reference import BAD_LOGITS


@dataclass(slots=True)
class DecodeState:
    """Tables with a row for each running sequence; the last row belongs to nobody.

    Attributes:
        last_token: [num_rows] int64, the token that the next step computes.
        num_tokens: [num_rows] int32, tokens of the sequence, `last_token` included.
        max_tokens: [num_rows] int32, the sequence ends when it has so many.
        is_active: [num_rows] int32, 0 once the sequence has ended.
        stop_ids: [num_rows, any] int64, token ids that end the sequence; -1 is none.
        block_tables: [num_rows, max_blocks] int32.
        temperature, top_p, min_p: [num_rows] float32, see `SamplingTensors`.
        top_k: [num_rows] int32.
        seeds: [num_rows] int64.
        generated: [num_rows, ring] int64, the token at position p of the sequence, as
            p * 2^32 + token, in column p % ring; `BAD_LOGITS` stands for a token that could not
            be sampled.
    """

    last_token: Tensor
    num_tokens: Tensor
    max_tokens: Tensor
    is_active: Tensor
    stop_ids: Tensor
    block_tables: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seeds: Tensor
    generated: Tensor


@dataclass(slots=True)
class DecodeInputs:
    """Where `decode_inputs` writes; N rows.

    Attributes:
        input_ids: [N] int64.
        positions: [N] int64, of the tokens in `input_ids`; 0 for an ended sequence.
        next_positions: [N] int64, of the tokens to be sampled.
        seq_lens: [N] int32, tokens that attention sees; 0 for an ended sequence.
        slot_mapping: [N] int64, where key and value go; -1 for an ended sequence.
        block_tables: [N, max_blocks] int32; entries past a sequence's need stay as they are.
        temperature, top_p, min_p, top_k, seeds: [N], as in `DecodeState`.
    """

    input_ids: Tensor
    positions: Tensor
    next_positions: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seeds: Tensor


NUM_COLUMNS = 9  # of `start_rows`, before the stop ids


def start_rows(state: DecodeState, columns: Tensor) -> None:
    """Give rows to new sequences; block tables are not touched.

    A sequence is active unless it has all of its tokens.

    Args:
        state: the tables, changed.
        columns: [N, NUM_COLUMNS + num_stop_ids] int64: row, last_token, num_tokens, max_tokens,
            top_k, seed, the bits of temperature, top_p and min_p as float32, then the stop ids.
    """
    if runs_triton(columns):
        from nbllm_kernels.gpu import decode_state as gpu

        gpu.start_rows(state, columns)
        return
    reference.start_rows(state, columns)


def decode_inputs(
    state: DecodeState, rows: Tensor, inputs: DecodeInputs, *, block_size: int
) -> None:
    """Look up what the next step of some sequences computes.

    Args:
        state: the tables.
        rows: [N] int64, rows of the tables, each at most once except for the last one.
        inputs: written.
        block_size: tokens in a page.
    """
    if runs_triton(rows):
        from nbllm_kernels.gpu import decode_state as gpu

        gpu.decode_inputs(state, rows, inputs, block_size=block_size)
        return
    reference.decode_inputs(state, rows, inputs, block_size=block_size)


def append_tokens(state: DecodeState, rows: Tensor, token_ids: Tensor) -> None:
    """Give sequences their next tokens and end those that a token or their length ends.

    Args:
        state: the tables, changed.
        rows: [N] int64; rows of ended sequences are left alone.
        token_ids: [N] int64; -1 ends the sequence with `BAD_LOGITS`.
    """
    if runs_triton(rows):
        from nbllm_kernels.gpu import decode_state as gpu

        gpu.append_tokens(state, rows, token_ids)
        return
    reference.append_tokens(state, rows, token_ids)


def fill_last_tokens(state: DecodeState, input_ids: Tensor) -> None:
    """Put the last tokens of sequences where the host, which may not know them, wrote their rows.

    Args:
        state: the tables.
        input_ids: [num_tokens] int64; -1 - row is replaced by `state.last_token[row]`.
    """
    if runs_triton(input_ids):
        from nbllm_kernels.gpu import decode_state as gpu

        gpu.fill_last_tokens(state, input_ids)
        return
    reference.fill_last_tokens(state, input_ids)


__all__ = [
    "BAD_LOGITS",
    "NUM_COLUMNS",
    "DecodeInputs",
    "DecodeState",
    "append_tokens",
    "decode_inputs",
    "fill_last_tokens",
    "start_rows",
]
