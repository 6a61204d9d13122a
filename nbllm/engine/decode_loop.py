"""DecodeLoop: steps in which every sequence computes one token, with nothing for the host to do.

    decode_inputs -> model -> sample -> append_tokens        (see nbllm_kernels.decode_state)

All four read and write tables on the device, so a step is the same work whatever the sequences
are: on a GPU it is captured, once for each bucket of batch sizes and kind of sampling, and replayed
as often as the scheduler wants.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nbllm.config import ModelConfig
from nbllm.engine.batch import Batch
from nbllm.engine.cascade import Cascade
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.logprobs import (
    LogprobReport,
    LogprobTensors,
    captured_report,
    make_logprob_tensors,
)
from nbllm.engine.sampler import SamplingKind, choose
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from nbllm.models.causal_lm import CausalLM
from nbllm_kernels import (
    AttentionMetadata,
    DecodeInputs,
    DecodeState,
    decode_inputs,
)


@dataclass(slots=True)
class _Bucket:
    """Buffers of one batch size, and the sequences that they were filled for."""

    rows: Tensor
    inputs: DecodeInputs
    metadata: AttentionMetadata
    cascade: Cascade | None
    hidden: Tensor | None = None
    logprobs: LogprobTensors | None = None
    kind: SamplingKind = field(default_factory=SamplingKind)
    filled_for: tuple[int, list[int]] | None = None


class DecodeLoop:
    """Runs decode steps, captured where that is possible.

    Args:
        model: weights loaded.
        batch: its tables.
        kv_caches: one per layer.
        graphs: what was captured.
        config: the model's shape.
    """

    def __init__(
        self,
        model: CausalLM,
        batch: Batch,
        kv_caches: list[Tensor],
        graphs: GraphCache,
        config: ModelConfig,
    ) -> None:
        self._config = config
        self._model = model
        self._batch = batch
        self._kv_caches = kv_caches
        self._graphs = graphs
        self._buckets: dict[int, _Bucket] = {}
        self._sizes = _bucket_sizes(batch.max_num_seqs)

    def run(self, output: SchedulerOutput) -> tuple[Tensor, LogprobReport | None]:
        """Enqueue steps in which all decode; results go to `DecodeState.generated`.

        Returns:
            [len(output.scheduled)] int64, the rows of the tables, until the next call; and what is
            reported of the tokens.
        """
        scheduled = output.scheduled
        bucket, metadata = self._prepare(scheduled)
        kind = bucket.kind
        if kind.any_logprob and bucket.logprobs is None:
            bucket.logprobs = make_logprob_tensors(
                len(bucket.rows), self._batch.vocab_size, self._batch.device
            )
        key = ("decode", len(bucket.rows), kind, metadata is bucket.metadata)
        for _ in range(output.num_steps):
            self._graphs.run(key, lambda: self._step(bucket, metadata, kind))
        report = captured_report(bucket.logprobs, scheduled) if kind.any_logprob else None
        return bucket.rows[: len(scheduled)], report

    def forward(self, output: SchedulerOutput) -> tuple[Tensor, Tensor]:
        """Enqueue a step as far as its logits are the host's business.

        Returns:
            the rows, as `run` does, and the hidden states of each, [len(output.scheduled),
            hidden_size], until the next call.
        """
        bucket, metadata = self._prepare(output.scheduled)

        def work() -> None:
            hidden = self._forward(bucket, metadata)
            if bucket.hidden is None:  # the first run of a key is not captured
                bucket.hidden = torch.empty_like(hidden)
            bucket.hidden.copy_(hidden)

        self._graphs.run(("decode", len(bucket.rows), None, metadata is bucket.metadata), work)
        assert bucket.hidden is not None
        num_rows = len(output.scheduled)
        return bucket.rows[:num_rows], bucket.hidden[:num_rows]

    def rehearse(self, num_rows: int, *, shares_prefix: bool = False) -> None:
        """Run a step of nobody: it reads weights and tables and changes nothing.

        Args:
            num_rows: of them.
            shares_prefix: the way of rows that begin alike, if they have one of their own.
        """
        bucket = self._make_bucket(num_rows)
        bucket.rows.fill_(self._batch.null_row)
        metadata = bucket.metadata
        if shares_prefix and bucket.cascade is not None:
            metadata = bucket.cascade.metadata
        self._step(bucket, metadata, SamplingKind())

    def _step(self, bucket: _Bucket, metadata: AttentionMetadata, kind: SamplingKind) -> None:
        hidden = self._forward(bucket, metadata)
        params = kind.tensors(bucket.inputs, bucket.inputs.next_positions)
        choose(self._model, hidden, bucket.rows, params, kind, self._batch, bucket.logprobs)

    def _forward(self, bucket: _Bucket, metadata: AttentionMetadata) -> Tensor:
        state, inputs = self._batch.state, bucket.inputs
        metadata.scratch.clear()
        decode_inputs(state, bucket.rows, inputs, block_size=self._batch.block_size)
        hidden: Tensor
        hidden = self._model(inputs.input_ids, inputs.positions, self._kv_caches, metadata)
        return hidden

    def _prepare(self, scheduled: Sequence[ScheduledRequest]) -> tuple[_Bucket, AttentionMetadata]:
        """Filled buffers, and how they are attended."""
        bucket = self._find_bucket(len(scheduled))
        self._fill(bucket, scheduled)
        if bucket.cascade is not None and bucket.cascade.is_filled:
            return bucket, bucket.cascade.metadata
        return bucket, bucket.metadata

    def _fill(self, bucket: _Bucket, scheduled: Sequence[ScheduledRequest]) -> None:
        """Send the rows, and what they share, unless they are the ones of the last time."""
        batch = self._batch
        rows = [batch.rows[item.request] for item in scheduled]
        filled_for = (batch.version, rows)
        if bucket.filled_for == filled_for:
            return
        bucket.filled_for = filled_for
        bucket.kind = SamplingKind.of(scheduled)
        padding = [batch.null_row] * (len(bucket.rows) - len(rows))
        bucket.rows.copy_(batch.to_device(rows + padding)[0])
        if bucket.cascade is not None:
            bucket.cascade.fill(batch, scheduled)

    def _find_bucket(self, num_rows: int) -> _Bucket:
        """The buffers that fit best; without graphs, some of that very size."""
        if not self._graphs.is_enabled:
            return self._make_bucket(num_rows)
        size = self._sizes[bisect.bisect_left(self._sizes, num_rows)]
        if size not in self._buckets:
            self._buckets[size] = self._make_bucket(size)
        return self._buckets[size]

    def _make_bucket(self, size: int) -> _Bucket:
        batch = self._batch
        num_blocks, device = batch.state.block_tables.shape[1], batch.device
        inputs = make_decode_inputs(size, batch.state)
        metadata = AttentionMetadata(
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=device),
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            max_query_len=1,
            max_seq_len=num_blocks * batch.block_size,
            num_decode_seqs=size,
            batch_invariant=batch.batch_invariant,
        )
        rows = torch.zeros(size, dtype=torch.int64, device=device)
        return _Bucket(rows, inputs, metadata, Cascade.make(metadata, batch, self._config))


def make_decode_inputs(size: int, state: DecodeState) -> DecodeInputs:
    """Buffers for `size` rows of `state`."""

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros((size, *shape), dtype=dtype, device=state.last_token.device)

    return DecodeInputs(
        input_ids=zeros(torch.int64),
        positions=zeros(torch.int64),
        next_positions=zeros(torch.int64),
        seq_lens=zeros(torch.int32),
        slot_mapping=zeros(torch.int64),
        block_tables=zeros(torch.int32, state.block_tables.shape[1]),
        temperature=zeros(torch.float32),
        top_p=zeros(torch.float32),
        min_p=zeros(torch.float32),
        top_k=zeros(torch.int32),
        seeds=zeros(torch.int64),
    )


def _bucket_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to 32, every 16 up to 64, every 32 up to 256, every 64."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, 257, 32)]
    sizes += range(320, max_num_seqs + 64, 64)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
