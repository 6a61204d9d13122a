"""DecodeLoop: steps in which every sequence computes one token, with nothing for the host to do.

    decode_inputs -> model -> sample -> append_tokens        (see nbllm_kernels.decode_state)

All four read and write tables on the device, so a step is the same work whatever the sequences
are: on a GPU it is captured as a CUDA graph, one for each bucket of batch sizes and kind of
sampling, and replayed as often as the scheduler wants. The first step of a bucket runs uncaptured:
a text's first tokens do not wait for a capture that may not pay.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nbllm.engine.batch import Batch
from nbllm.engine.request import Request
from nbllm.models.causal_lm import CausalLM
from nbllm_kernels import (
    AttentionMetadata,
    DecodeInputs,
    SamplingTensors,
    append_tokens,
    decode_inputs,
    sample,
)

logger = logging.getLogger(__name__)

_RUNS_BEFORE_CAPTURE = 1


@dataclass(frozen=True, slots=True)
class SamplingKind:
    """What of the sampler a batch needs; as in `SamplingTensors`."""

    all_greedy: bool
    any_filter: bool

    @classmethod
    def of(cls, requests: Sequence[Request]) -> SamplingKind:
        """The least that serves all of `requests`."""
        params = [request.sampling_params for request in requests]
        return cls(
            all_greedy=all(p.temperature == 0.0 for p in params),
            any_filter=any(
                p.temperature != 0.0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
                for p in params
            ),
        )


@dataclass(slots=True)
class _Bucket:
    """Buffers of one batch size, and what was captured on them."""

    rows: Tensor
    inputs: DecodeInputs
    metadata: AttentionMetadata
    current_rows: list[int] | None = None
    num_runs: dict[SamplingKind, int] = field(default_factory=dict)
    graphs: dict[SamplingKind, torch.cuda.CUDAGraph] = field(default_factory=dict)


class DecodeLoop:
    """Runs decode steps, captured where that is possible.

    Args:
        model: weights loaded.
        batch: its tables.
        kv_caches: one per layer.
        captures: use CUDA graphs.

    Attributes:
        num_replays: graphs replayed so far.
    """

    def __init__(
        self, model: CausalLM, batch: Batch, kv_caches: list[Tensor], *, captures: bool
    ) -> None:
        self._model = model
        self._batch = batch
        self._kv_caches = kv_caches
        self._captures = captures
        self._buckets: dict[int, _Bucket] = {}
        self._sizes = _bucket_sizes(batch.max_num_seqs)
        self._pool: Any = None  # of memory, shared by all graphs
        self.num_replays = 0

    def run(self, requests: Sequence[Request], num_steps: int) -> None:
        """Enqueue `num_steps` steps; results go to `DecodeState.generated`.

        Args:
            requests: all decoding; each has pages for `num_steps` more tokens.
        """
        kind = SamplingKind.of(requests)
        rows = [self._batch.rows[request] for request in requests]
        if not self._captures:
            bucket = self._make_bucket(len(rows))  # of this very size: nothing is padded
            self._send_rows(bucket, rows)
            for _ in range(num_steps):
                self._step(bucket, kind)
                bucket.metadata.scratch.clear()
            return
        bucket = self._find_bucket(len(rows))
        self._send_rows(bucket, rows)
        for _ in range(num_steps):
            graph = self._graph(bucket, kind)
            if graph is None:
                self._step(bucket, kind)
            else:
                graph.replay()
                self.num_replays += 1

    def _step(self, bucket: _Bucket, kind: SamplingKind) -> None:
        state, inputs = self._batch.state, bucket.inputs
        decode_inputs(state, bucket.rows, inputs, block_size=self._batch.block_size)
        hidden = self._model(inputs.input_ids, inputs.positions, self._kv_caches, bucket.metadata)
        logits = self._model.compute_logits(hidden)
        tensors = SamplingTensors(
            temperature=inputs.temperature,
            top_k=inputs.top_k,
            top_p=inputs.top_p,
            min_p=inputs.min_p,
            seeds=inputs.seeds,
            positions=inputs.next_positions,
            all_greedy=kind.all_greedy,
            any_filter=kind.any_filter,
        )
        append_tokens(state, bucket.rows, sample(logits, tensors))

    def _graph(self, bucket: _Bucket, kind: SamplingKind) -> torch.cuda.CUDAGraph | None:
        """The graph of a bucket, captured when it is wanted for the second time; None before."""
        if not self._captures or kind in bucket.graphs:
            return bucket.graphs.get(kind)
        num_runs = bucket.num_runs.get(kind, 0)
        bucket.num_runs[kind] = num_runs + 1
        if num_runs < _RUNS_BEFORE_CAPTURE:
            return None
        try:
            bucket.graphs[kind] = self._capture(bucket, kind)
        except RuntimeError as error:  # most likely memory; the steps themselves can go on
            self._captures = False
            logger.warning("CUDA graphs are off from now on: %s", error)
            return None
        return bucket.graphs[kind]

    def _capture(self, bucket: _Bucket, kind: SamplingKind) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: what the notebook does on the GPU in the meantime is its own business.
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            self._step(bucket, kind)
        return graph

    def _send_rows(self, bucket: _Bucket, rows: list[int]) -> None:
        if bucket.current_rows == rows:
            return
        padding = [self._batch.null_row] * (len(bucket.rows) - len(rows))
        bucket.rows.copy_(self._batch.to_device(rows + padding)[0])
        bucket.current_rows = rows

    def _find_bucket(self, num_rows: int) -> _Bucket:
        size = self._sizes[bisect.bisect_left(self._sizes, num_rows)]
        if size not in self._buckets:
            self._buckets[size] = self._make_bucket(size)
        return self._buckets[size]

    def _make_bucket(self, size: int) -> _Bucket:
        batch = self._batch
        state, device = batch.state, batch.device

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((size, *shape), dtype=dtype, device=device)

        inputs = DecodeInputs(
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
        metadata = AttentionMetadata(
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=device),
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            max_query_len=1,
            max_seq_len=state.block_tables.shape[1] * batch.block_size,
            num_decode_seqs=size,
            batch_invariant=batch.batch_invariant,
        )
        return _Bucket(zeros(torch.int64), inputs, metadata)


def _bucket_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to 32, every 16 up to 64, every 32 up to 256, every 64."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, 257, 32)]
    sizes += range(320, max_num_seqs + 64, 64)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
