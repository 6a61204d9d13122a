"""Batch: the running requests as rows of tables that live on the device.

Every request owns one row from its admission until it finishes or is preempted. The host sends
differences only: the sampling parameters once, new pages as they are allotted, prompt tokens as
they are scheduled. What a decode step starts from is never sent: the step before left it in
`DecodeState`. So a step needs no table rebuilt, and a captured graph can run several in a row.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nbllm.engine.request import MAX_STOP_IDS, Request
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from nbllm.engine.step_buffers import StepBuffers, StepSize
from nbllm_kernels import (
    MAX_COUNT,
    NUM_COLUMNS,
    PROMPT_FLAG,
    AttentionMetadata,
    DecodeState,
    Penalties,
    fill_last_tokens,
    start_rows,
)

RING = 8  # tokens that a row may get in one launch


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step that was sent to the device.

    Attributes:
        buffers: its numbers.
        attention: metadata of the attention kernels, on the same buffers.
        sampled: the requests that get a token in this step, in batch order.
    """

    buffers: StepBuffers
    attention: AttentionMetadata
    sampled: list[ScheduledRequest]

    @property
    def sampled_rows(self) -> Tensor:
        """[num_sampled] int64, the rows of `sampled` in the tables."""
        return self.buffers["sampled_rows"][: len(self.sampled)]


class Batch:
    """Tables of the running requests.

    Attributes:
        state: the tables on the device.
        host_tables: [max_num_seqs + 1, max_blocks], a copy of `state.block_tables`.

    Args:
        max_num_seqs: rows.
        max_model_len: longest sequence, in tokens.
        block_size: tokens in a page.
        vocab_size: ids that the model knows.
        device: where the tables live.
        batch_invariant: passed on to the kernels.
        needs_prompt_lens: the model wants `AttentionMetadata.prompt_lens`.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        batch_invariant: bool = False,
        needs_prompt_lens: bool = False,
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.batch_invariant = batch_invariant
        self.needs_prompt_lens = needs_prompt_lens
        self.max_num_seqs = max_num_seqs
        self.null_row = max_num_seqs  # ended for ever: pads batches
        max_blocks = -(-max_model_len // block_size)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((max_num_seqs + 1, *shape), dtype=dtype, device=device)

        self.state = DecodeState(
            last_token=zeros(torch.int64),
            num_tokens=zeros(torch.int32),
            max_tokens=zeros(torch.int32),
            is_active=zeros(torch.int32),
            stop_ids=zeros(torch.int64, MAX_STOP_IDS),
            block_tables=zeros(torch.int32, max_blocks),
            temperature=zeros(torch.float32),
            top_p=zeros(torch.float32),
            min_p=zeros(torch.float32),
            top_k=zeros(torch.int32),
            seeds=zeros(torch.int64),
            generated=zeros(torch.int64, RING) - 1,
        )
        self._penalties: Penalties | None = None
        self.rows: dict[Request, int] = {}
        self.version = 0  # changes whenever a row gets another owner
        self._free_rows = list(range(max_num_seqs))[::-1]
        self._num_blocks_sent = [0] * max_num_seqs
        self.host_tables = np.zeros(self.state.block_tables.shape, dtype=np.int32)

    @property
    def penalties(self) -> Penalties:
        """Made when the first request with a penalty arrives: two bytes for each row and id."""
        if self._penalties is None:
            num_rows = self.max_num_seqs + 1
            shape = (num_rows, self.vocab_size)
            self._penalties = Penalties(
                occurrences=torch.zeros(shape, dtype=torch.int16, device=self.device),
                presence=torch.zeros(num_rows, device=self.device),
                frequency=torch.zeros(num_rows, device=self.device),
                repetition=torch.ones(num_rows, device=self.device),
            )
        return self._penalties

    def clear(self) -> None:
        """Give up all rows."""
        self._free_rows = list(range(len(self._num_blocks_sent)))[::-1]
        self.rows = {}

    def remove(self, request: Request) -> None:
        """Give up the row of a request that finished or was preempted, if it has one."""
        row = self.rows.pop(request, None)
        if row is not None:
            self._free_rows.append(row)

    def update(self, requests: Sequence[Request]) -> None:
        """Bring the tables up to date: rows for requests that have none, pages that are new."""
        self._add_new(requests)
        self._send_new_blocks(requests)

    def rehearse(self) -> None:
        """Start nobody: the null row is written as it is."""
        columns = torch.zeros(1, NUM_COLUMNS + MAX_STOP_IDS, dtype=torch.int64, device=self.device)
        columns[:, 0] = self.null_row
        start_rows(self.state, columns)

    def prepare(
        self,
        output: SchedulerOutput,
        buffers: StepBuffers | None = None,
        num_decodes: int | None = None,
    ) -> StepInput:
        """Build the tensors of a step of any kind.

        What a decoding sequence computes may not be known yet: in the place of its token stands
        the row in which `fill_last_tokens` finds it.

        Args:
            output: the step; the tables are up to date.
            buffers: where to, padded to their size; None makes some that fit.
            num_decodes: of so many decoding sequences, padded ones included; None pads none.
        """
        if num_decodes is None:
            num_decodes = output.num_decodes
        scheduled = output.scheduled
        places, rows, starts, lens = self._sequences(output, num_decodes)
        num_seqs, padding = len(rows), slice(output.num_decodes, num_decodes)
        loc = np.zeros(num_seqs + 1, dtype=np.int64)
        np.cumsum(lens, out=loc[1:])
        num_tokens, max_seq_len = int(loc[-1]), int((starts + lens).max())
        num_blocks = -(-max_seq_len // self.block_size)
        sequence = np.repeat(np.arange(num_seqs), lens)
        positions = np.arange(num_tokens) + (starts - loc[:-1])[sequence]
        pages = self.host_tables[rows[sequence], positions // self.block_size].astype(np.int64)
        slots = pages * self.block_size + positions % self.block_size
        slots[padding] = -1
        seq_lens = starts + lens
        seq_lens[padding] = 0
        token_ids = array("I")
        for item in scheduled[output.num_decodes :]:
            token_ids += item.request.token_ids[item.start : item.first_position]
        sampled = [
            place
            for place, item in enumerate(scheduled)
            if item.num_sampled_tokens and item.request.pooling_params is None
        ]
        has_prompt_lens = self.needs_prompt_lens and not output.only_decodes
        prompt_lens: list[int] = []
        if has_prompt_lens:
            prompt_lens = [
                max(i.request.num_prompt_tokens, i.request.restarted_len) for i in scheduled
            ]
        if buffers is None:
            size = StepSize(num_tokens, num_seqs, len(sampled), num_blocks)
            buffers = StepBuffers(size, self.device)
        arrays = {
            "input_ids": np.r_[-1 - rows[:num_decodes], np.asarray(token_ids)],
            "positions": positions,
            "slot_mapping": slots,
            "sampled_rows": rows[places[sampled]],
            "logits_indices": loc[1:][places[sampled]] - 1,
            "prompt_lens": np.array(prompt_lens),
            "query_start_loc": loc,
            "seq_lens": seq_lens,
            "block_tables": self.host_tables[rows, :num_blocks],
        }
        buffers.send(arrays, self.null_row)
        metadata = buffers.metadata(
            max_query_len=int(lens.max()),
            max_seq_len=max_seq_len,
            num_decode_seqs=num_decodes,
            batch_invariant=self.batch_invariant,
            has_prompt_lens=has_prompt_lens,
        )
        return StepInput(buffers, metadata, [scheduled[i] for i in sampled])

    def _sequences(self, output: SchedulerOutput, num_decodes: int) -> tuple[np.ndarray, ...]:
        """Of the sequences of a step, `num_decodes` decoding ones first, the last of them padding.

        Returns:
            places: where each scheduled one is among them; and of all of them:
            rows: in the tables.
            starts: positions of their first new tokens.
            lens: numbers of new tokens.
        """
        num_seqs = len(output.scheduled) + num_decodes - output.num_decodes
        places = np.r_[0 : output.num_decodes, num_decodes:num_seqs]
        rows = np.full(num_seqs, self.null_row)
        starts = np.zeros(num_seqs, dtype=np.int64)
        lens = np.ones(num_seqs, dtype=np.int64)
        rows[places] = [self.rows[item.request] for item in output.scheduled]
        starts[places] = [item.start for item in output.scheduled]
        lens[places] = [item.num_scheduled_tokens for item in output.scheduled]
        return places, rows, starts, lens

    def fill_last_tokens(self, buffers: StepBuffers) -> None:
        """Look up the tokens that `prepare` left open."""
        fill_last_tokens(self.state, buffers["input_ids"])

    def _add_new(self, requests: Sequence[Request]) -> None:
        new = [request for request in requests if request not in self.rows]
        if not new:
            return
        self.version += 1
        for request in new:
            row = self._free_rows.pop()
            self.rows[request] = row
            self._num_blocks_sent[row] = 0
        rows = [self.rows[request] for request in new]
        # After a preemption a sequence may come back with all but its last token cached: it
        # decodes at once, from a token that was sampled into another row.
        params = [request.sampling_params for request in new]
        floats = np.array([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32)
        bits = floats.view(np.int32).tolist()
        columns = [
            (
                row,
                request.token_ids[-1],
                request.num_tokens,
                request.max_num_tokens,
                max(p.top_k, 0),
                _signed_64(request.seed),
                *bits_of_row,
                *_stop_ids(request),
            )
            for request, p, row, bits_of_row in zip(new, params, rows, bits, strict=True)
        ]
        (sent,) = self.to_device(np.array(columns, dtype=np.int64).ravel())
        start_rows(self.state, sent.view(len(new), NUM_COLUMNS + MAX_STOP_IDS))
        if self._penalties is not None or any(request.has_penalties for request in new):
            self._add_penalties(new)

    def _add_penalties(self, new: Sequence[Request]) -> None:
        """Fill the tables of the penalties for new rows.

        Occurrences only where they matter: nobody else reads them.
        """
        penalties, params = self.penalties, [request.sampling_params for request in new]
        columns = [(p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for p in params]
        penalized = [request for request in new if request.has_penalties]
        prompts = [set(r.token_ids[: r.num_prompt_tokens]) for r in penalized]
        outputs = [Counter(r.output_token_ids) for r in penalized]
        numbers = [self.rows[request] for request in penalized]
        rows, whole, prompt_rows, prompt_ids, output_rows, output_ids, counts = self.to_device(
            [self.rows[request] for request in new],
            numbers,
            np.repeat(numbers, [len(ids) for ids in prompts]),
            [i for ids in prompts for i in ids],
            np.repeat(numbers, [len(ids) for ids in outputs]),
            [i for ids in outputs for i in ids],
            [min(count, MAX_COUNT) for ids in outputs for count in ids.values()],
        )
        floats = torch.tensor(columns).to(self.device, torch.float32)
        for column, table in enumerate(
            (penalties.presence, penalties.frequency, penalties.repetition)
        ):
            table[rows] = floats[:, column]
        occurrences = penalties.occurrences
        occurrences[whole] = 0
        occurrences[output_rows, output_ids] = counts.to(occurrences.dtype)
        occurrences[prompt_rows, prompt_ids] |= PROMPT_FLAG

    def _send_new_blocks(self, requests: Sequence[Request]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for request in requests:
            row = self.rows[request]
            sent, total = self._num_blocks_sent[row], len(request.block_table)
            if sent < total:
                rows += [row] * (total - sent)
                columns += range(sent, total)
                blocks += request.block_table[sent:]
                self._num_blocks_sent[row] = total
        if rows:
            self.host_tables[rows, columns] = blocks
            rows_t, columns_t, blocks_t = self.to_device(rows, columns, blocks)
            self.state.block_tables[rows_t, columns_t] = blocks_t.to(torch.int32)

    def to_device(self, *arrays: list[int] | np.ndarray) -> tuple[Tensor, ...]:
        """Several int64 arrays to the device in one copy."""
        sizes = [len(array) for array in arrays]
        host = torch.from_numpy(np.concatenate([np.asarray(a, dtype=np.int64) for a in arrays]))
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True).split(sizes)


def _stop_ids(request: Request) -> list[int]:
    """Ids that end the text, -1 in the places that are left."""
    ids = request.stop_ids
    if len(ids) > MAX_STOP_IDS:
        ids = []
    return ids + [-1] * (MAX_STOP_IDS - len(ids))


def _signed_64(value: int) -> int:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >= 1 << 63 else value
