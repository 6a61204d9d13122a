"""PromptGraphs: steps that compute more than one token of some sequence, captured by their size.

What such a step waits for is often not its work but its hundreds of launches: all of them for the
first token of a short prompt, and most of them when cells and tokenizers want the interpreter at
the same time. So a step is padded to one of a few sizes and replayed. What is padded belongs to no
sequence, writes to no slot and samples for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbllm.config import ModelConfig
from nbllm.engine.batch import Batch, StepInput
from nbllm.engine.cascade import Cascade
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.decode_loop import make_decode_inputs
from nbllm.engine.logprobs import (
    LogprobReport,
    LogprobTensors,
    captured_report,
    make_logprob_tensors,
)
from nbllm.engine.sampler import SamplingKind, choose
from nbllm.engine.scheduler_output import SchedulerOutput
from nbllm.engine.step_buffers import StepBuffers, StepSize
from nbllm.models.causal_lm import CausalLM
from nbllm_kernels import AttentionMetadata, DecodeInputs, decode_inputs

_MIN_TOKENS = 32  # up to 16 rows the products have kernels of their own, which take long to compile
_TOKENS = 512  # multiples of it are sizes, and powers of two below
_SIZES_PER_OCTAVE = 4  # each is captured for every kind of step: no more of the large ones
MIN_SEQS = 8
_SEQS_FACTOR = 4  # from one number of sequences to the next


class _Size(NamedTuple):
    """What a step is padded to.

    Attributes:
        num_tokens: those of the decoding sequences included.
        num_decodes: sequences that decode, with one token each.
        num_prompts: the other sequences.
    """

    num_tokens: int
    num_decodes: int
    num_prompts: int


@dataclass(slots=True)
class _Bucket:
    """Buffers for one size."""

    buffers: StepBuffers
    metadata: AttentionMetadata
    inputs: DecodeInputs
    cascade: Cascade | None
    hidden: Tensor | None = None
    logprobs: LogprobTensors | None = None


class PromptGraphs:
    """Runs small steps, captured.

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
        self._buckets: dict[_Size, _Bucket] = {}

    def can_run(self, output: SchedulerOutput) -> bool:
        """True for a step that needs nothing but the last hidden state of each sequence."""
        return self._graphs.is_enabled and not any(
            item.request.reads_hidden_states for item in output.scheduled
        )

    def run(self, output: SchedulerOutput) -> tuple[StepInput, LogprobReport | None]:
        """Enqueue a step; results go to `DecodeState.generated`.

        Returns:
            the step, and what is reported of its tokens.
        """
        size, bucket, metadata, step = self._prepare(output)
        kind = SamplingKind.of(step.sampled)
        if kind.any_logprob and bucket.logprobs is None:
            bucket.logprobs = make_logprob_tensors(
                len(bucket.inputs.seeds), self._batch.vocab_size, self._batch.device
            )
        self._graphs.run(("prompt", size, kind), lambda: self._step(bucket, metadata, kind))
        return step, captured_report(bucket.logprobs, step.sampled) if kind.any_logprob else None

    def forward(self, output: SchedulerOutput) -> tuple[StepInput, Tensor]:
        """Enqueue a step as far as its logits are the host's business.

        Returns:
            the step, and the hidden states that its logits come from, [len(step.sampled),
            hidden_size], until the next call.
        """
        size, bucket, metadata, step = self._prepare(output)

        def work() -> None:
            hidden = self._forward(bucket, metadata)
            if bucket.hidden is None:  # the first run of a key is not captured
                bucket.hidden = torch.empty_like(hidden)
            bucket.hidden.copy_(hidden)

        self._graphs.run(("prompt", size, None), work)
        assert bucket.hidden is not None
        return step, bucket.hidden[: len(step.sampled)]

    def rehearse(self, num_tokens: int) -> None:
        """Run a step of nobody: it reads weights and tables and changes nothing."""
        bucket = self._make_bucket(_Size(num_tokens, 0, MIN_SEQS))
        nothing = np.zeros(0, dtype=np.int64)
        num_blocks = bucket.metadata.block_tables.shape[1]
        arrays = dict.fromkeys(bucket.buffers.tensors, nothing)
        arrays |= {
            "query_start_loc": np.zeros(1, dtype=np.int64),
            "block_tables": np.zeros((0, num_blocks), dtype=np.int64),
        }
        bucket.buffers.send(arrays, self._batch.null_row)
        self._step(bucket, bucket.metadata, SamplingKind())

    def _step(self, bucket: _Bucket, metadata: AttentionMetadata, kind: SamplingKind) -> None:
        hidden = self._forward(bucket, metadata)
        rows = bucket.buffers["sampled_rows"]
        decode_inputs(self._batch.state, rows, bucket.inputs, block_size=self._batch.block_size)
        params = kind.tensors(bucket.inputs, bucket.inputs.next_positions)
        choose(self._model, hidden, rows, params, kind, self._batch, bucket.logprobs)

    def _forward(self, bucket: _Bucket, metadata: AttentionMetadata) -> Tensor:
        buffers = bucket.buffers
        metadata.scratch.clear()
        self._batch.fill_last_tokens(buffers)
        hidden: Tensor
        hidden = self._model(buffers["input_ids"], buffers["positions"], self._kv_caches, metadata)
        return hidden[buffers["logits_indices"]]

    def _prepare(
        self, output: SchedulerOutput
    ) -> tuple[_Size, _Bucket, AttentionMetadata, StepInput]:
        """Filled buffers, how they are attended, and what the step is."""
        size = self._size(output)
        if size not in self._buckets:
            self._buckets[size] = self._make_bucket(size)
        bucket = self._buckets[size]
        step = self._batch.prepare(output, bucket.buffers, size.num_decodes)
        if bucket.cascade is None:
            return size, bucket, bucket.metadata, step
        # Also if nothing is shared: half as many graphs.
        bucket.cascade.fill(self._batch, output.scheduled[: output.num_decodes])
        return size, bucket, bucket.cascade.metadata, step

    def _size(self, output: SchedulerOutput) -> _Size:
        num_decodes = self._num_seqs(output.num_decodes)
        num_tokens = _padded(output.num_tokens - output.num_decodes) + num_decodes
        return _Size(
            num_tokens, num_decodes, self._num_seqs(len(output.scheduled) - output.num_decodes)
        )

    def _num_seqs(self, num_seqs: int) -> int:
        size = MIN_SEQS if num_seqs else 0
        while size < num_seqs:
            size *= _SEQS_FACTOR
        return min(size, self._batch.max_num_seqs)

    def _make_bucket(self, size: _Size) -> _Bucket:
        batch = self._batch
        num_blocks = batch.state.block_tables.shape[1]
        num_seqs = size.num_decodes + size.num_prompts
        num_sampled = min(num_seqs, batch.max_num_seqs)
        buffers = StepBuffers(
            StepSize(size.num_tokens, num_seqs, num_sampled, num_blocks), batch.device
        )
        metadata = buffers.metadata(
            max_query_len=size.num_tokens,
            max_seq_len=num_blocks * batch.block_size,
            num_decode_seqs=size.num_decodes,
            batch_invariant=batch.batch_invariant,
            has_prompt_lens=False,
        )
        inputs = make_decode_inputs(num_sampled, batch.state)
        return _Bucket(buffers, metadata, inputs, Cascade.make(metadata, batch, self._config))


def _padded(num_tokens: int) -> int:
    """The next size, at most a quarter larger if there are many tokens."""
    octave = 1 << (num_tokens - 1).bit_length()
    if octave <= _TOKENS:
        return max(_MIN_TOKENS, octave)
    step = max(_TOKENS, octave // 2 // _SIZES_PER_OCTAVE)
    return -(-num_tokens // step) * step
