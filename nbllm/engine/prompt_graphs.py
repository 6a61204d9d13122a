"""PromptGraphs: steps with few tokens of any kind, captured by the number of their tokens.

What a first token waits for is not the work of a short prompt but its hundreds of launches. So a
step of at most `MAX_TOKENS` tokens of a few sequences is padded to a power of two and replayed;
what is padded belongs to no sequence, writes to no slot and samples for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nbllm.engine.batch import Batch, StepInput
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.decode_loop import make_decode_inputs
from nbllm.engine.sampler import SamplingKind
from nbllm.engine.scheduler_output import SchedulerOutput
from nbllm.engine.step_buffers import StepBuffers, StepSize
from nbllm.models.causal_lm import CausalLM
from nbllm_kernels import AttentionMetadata, DecodeInputs, append_tokens, decode_inputs, sample

MAX_TOKENS = 512
_MIN_TOKENS = 16
_NUM_SEQS = 8


@dataclass(slots=True)
class _Bucket:
    """Buffers for one number of tokens."""

    buffers: StepBuffers
    metadata: AttentionMetadata
    inputs: DecodeInputs


class PromptGraphs:
    """Runs small steps, captured.

    Args:
        model: weights loaded.
        batch: its tables.
        kv_caches: one per layer.
        graphs: what was captured.
    """

    def __init__(
        self, model: CausalLM, batch: Batch, kv_caches: list[Tensor], graphs: GraphCache
    ) -> None:
        self._model = model
        self._batch = batch
        self._kv_caches = kv_caches
        self._graphs = graphs
        self._buckets: dict[int, _Bucket] = {}

    def can_run(self, output: SchedulerOutput) -> bool:
        """True for a small step that needs nothing but a token id of each sequence."""
        return (
            self._graphs.is_enabled
            and len(output.scheduled) <= _NUM_SEQS
            and output.num_tokens <= MAX_TOKENS
            and not output.shapes_logits
            and all(i.request.sampling_params.prompt_logprobs is None for i in output.scheduled)
        )

    def run(self, output: SchedulerOutput) -> StepInput:
        """Enqueue a step; results go to `DecodeState.generated`."""
        size = max(_MIN_TOKENS, 1 << (output.num_tokens - 1).bit_length())
        if size not in self._buckets:
            self._buckets[size] = self._make_bucket(size)
        bucket = self._buckets[size]
        step = self._batch.prepare(output, bucket.buffers)
        kind = SamplingKind.of([item.request for item in step.sampled])
        self._graphs.run(("prompt", size, kind), lambda: self._step(bucket, kind))
        return step

    def _step(self, bucket: _Bucket, kind: SamplingKind) -> None:
        buffers, state = bucket.buffers, self._batch.state
        self._batch.fill_last_tokens(buffers)
        hidden = self._model(
            buffers["input_ids"], buffers["positions"], self._kv_caches, bucket.metadata
        )
        rows = buffers["sampled_rows"]
        decode_inputs(state, rows, bucket.inputs, block_size=self._batch.block_size)
        logits = self._model.compute_logits(hidden[buffers["logits_indices"]])
        append_tokens(
            state, rows, sample(logits, kind.tensors(bucket.inputs, bucket.inputs.next_positions))
        )

    def _make_bucket(self, size: int) -> _Bucket:
        batch = self._batch
        num_blocks = batch.state.block_tables.shape[1]
        buffers = StepBuffers(StepSize(size, _NUM_SEQS, _NUM_SEQS, num_blocks), batch.device)
        metadata = buffers.metadata(
            max_query_len=size,
            max_seq_len=num_blocks * batch.block_size,
            num_decode_seqs=0,  # all sequences go the way of the prompts
            batch_invariant=batch.batch_invariant,
            has_prompt_lens=False,
        )
        return _Bucket(buffers, metadata, make_decode_inputs(_NUM_SEQS, batch.state))
