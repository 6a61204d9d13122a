"""ModelRunner: runs the model on one step's batch and samples. Owns the weights and the KV
cache."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.batch import RING, Batch, StepInput
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.decode_loop import DecodeLoop
from nbllm.engine.kv_cache import allocate_kv_caches
from nbllm.engine.logprobs import gather_logprobs
from nbllm.engine.prompt_graphs import PromptGraphs
from nbllm.engine.request import Request
from nbllm.engine.sampler import Sampler, find_dead_ends
from nbllm.engine.scheduler import SchedulerOutput
from nbllm.errors import RequestFailedError
from nbllm.models.causal_lm import CausalLM
from nbllm.outputs import PositionLogprobs
from nbllm_kernels import BAD_LOGITS, append_tokens

_MAX_STEPS = 8  # in a row: a few milliseconds of a small model
_PROMPT_LOGPROBS_ROWS = 256  # rows of logits at a time: the vocabulary may be large


@dataclass(slots=True)
class StepOutput:
    """What a step produced.

    Attributes:
        sampled: the new tokens of each request whose last token was computed, one for every step
            up to the one that ended it.
        logprobs: log-probabilities at the sampled position, for requests that want them.
        prompt_logprobs: those of the prompt tokens that this step scored, likewise.
        failed: requests whose logits were not numbers, or that allow no token.
    """

    sampled: dict[Request, list[int]] = field(default_factory=dict)
    logprobs: dict[Request, PositionLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[PositionLogprobs]] = field(default_factory=dict)
    failed: dict[Request, RequestFailedError] = field(default_factory=dict)


@dataclass(slots=True)
class PendingStep:
    """A step that was enqueued on the device.

    Attributes:
        output: what it computes.
        sampled_requests: those that it samples for.
        rows: their rows in the tables.
        first_positions: the positions of the first tokens that it samples for them.
        generated: `DecodeState.generated` after the step; on its way to the host until `event`.
        partial_result: what is known of the result but for the sampled tokens.
    """

    output: SchedulerOutput
    sampled_requests: list[Request]
    rows: list[int]
    first_positions: list[int]
    generated: Tensor
    event: torch.cuda.Event | None
    partial_result: StepOutput

    def result(self) -> StepOutput:
        """Wait for the step, and put its result together."""
        if self.event is not None:
            self.event.synchronize()
        if not self.sampled_requests:
            return self.partial_result
        steps = np.arange(self.output.num_steps)[None]
        positions = np.array(self.first_positions)[:, None] + steps
        entries = self.generated.numpy()[np.array(self.rows)[:, None], positions % RING]
        entries = entries - BAD_LOGITS  # from zero on, so that the halves don't borrow
        counts = (entries >> 32 == positions).sum(axis=1).tolist()
        tokens = ((entries & 0xFFFF_FFFF) + BAD_LOGITS).tolist()
        result = self.partial_result
        for request, row, count in zip(self.sampled_requests, tokens, counts, strict=True):
            if request in result.failed or not count:
                continue
            if row[count - 1] == BAD_LOGITS:
                result.failed[request] = RequestFailedError(
                    "the model computed logits that are not numbers (NaN or infinite): "
                    "the weights are damaged, or overflow in this dtype (try dtype='float32')"
                )
            else:
                result.sampled[request] = row[:count]
        return result


class ModelRunner:
    """Runs steps on one device, on a stream of its own if that is a GPU.

    Args:
        model: weights loaded.
        model_config: its shape.
        config: the resolved configuration.
        device: where the model is.
        dtype: of the KV cache, normally the model's.
    """

    def __init__(
        self,
        model: CausalLM,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert config.max_num_seqs is not None
        assert config.max_model_len is not None
        assert config.block_size is not None
        self.model = model
        self.device = device
        self.vocab_size = model_config.vocab_size
        self.kv_caches = allocate_kv_caches(config, model_config, device=device, dtype=dtype)
        self.sampler = Sampler()
        self.batch = Batch(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            vocab_size=self.vocab_size,
            device=device,
            batch_invariant=config.batch_invariant,
            needs_prompt_lens=model_config.length_rope is not None,
        )
        on_gpu = device.type == "cuda"
        captures = on_gpu and not config.enforce_eager and model_config.length_rope is None
        self.graphs = GraphCache(is_enabled=captures)
        self.decode_loop = DecodeLoop(model, self.batch, self.kv_caches, self.graphs, model_config)
        self.prompt_graphs = PromptGraphs(model, self.batch, self.kv_caches, self.graphs)
        self.max_steps = _MAX_STEPS if captures else 1
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._copy_stream = torch.cuda.Stream(device) if on_gpu else None
        if on_gpu:
            torch.cuda.synchronize(device)  # weights and tables came on another stream

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> PendingStep:
        """Enqueue a step: forward, logits of the last tokens, one sampled token each.

        Several steps may be pending; they run in their order.
        """
        requests = [item.request for item in output.scheduled]
        with self._on_stream():
            self.batch.update(requests)
            result = StepOutput()
            if output.only_decodes and not any(request.shapes_logits for request in requests):
                sampled = requests
                self.decode_loop.run(requests, output.num_steps)
            elif self.prompt_graphs.can_run(output):
                sampled = self.prompt_graphs.run(output)
            else:
                sampled = self._run_any(output, result)
            rows = [self.batch.rows[request] for request in sampled]
            first = [request.num_tokens + output.num_unknown_tokens for request in sampled]
            generated, event = self._read_generated()
        return PendingStep(output, sampled, rows, first, generated, event, result)

    def synchronize(self) -> None:
        """Wait until nothing is pending on the device."""
        if self._stream is not None:
            self._stream.synchronize()

    def _run_any(self, output: SchedulerOutput, result: StepOutput) -> list[Request]:
        """A step of any kind; returns the requests that it samples for."""
        step = self.batch.prepare(output)
        buffers = step.buffers
        hidden = self.model(
            buffers["input_ids"], buffers["positions"], self.kv_caches, step.attention
        )
        self._score_prompts(hidden, output, result)
        if step.sampled_requests:
            self._sample(hidden, step, result)
        return step.sampled_requests

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _read_generated(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy of the table on the host, behind everything that is pending now."""
        generated = self.batch.state.generated
        if self._stream is None or self._copy_stream is None:
            return generated, None
        host = torch.empty(generated.shape, dtype=generated.dtype, pin_memory=True)
        self._copy_stream.wait_stream(self._stream)
        with torch.cuda.stream(self._copy_stream):
            host.copy_(generated, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return host, event

    def release(self) -> None:
        """Drop weights, KV cache and tables, whoever still holds a reference to this object."""
        try:
            self.synchronize()  # the memory goes to others, who work on other streams
        except RuntimeError:
            pass  # the device is dead
        self.kv_caches.clear()  # in place: a frame of a traceback may hold the list
        for module in list(self.model.modules()):
            vars(module).clear()  # a traceback may keep a layer alive, but not its weights
        del self.model
        del self.decode_loop
        del self.prompt_graphs
        del self.graphs
        del self.batch
        gc.collect()
        if self.device.type == "cuda":
            # cuBLAS keeps a workspace for every stream that it was used on; ours is gone.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            # glibc keeps what was freed below something that is still in use; ask it not to.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)

    @torch.inference_mode()
    def zero_blocks(self, blocks: list[int]) -> None:
        """Erase pages whose content is unknown: a NaN left there would spoil their next owner.

        Page by page and without a new tensor: what failed may have been the memory.
        """
        with self._on_stream():
            for kv_cache in self.kv_caches:
                for block in blocks:
                    kv_cache[:, block].zero_()

    def _sample(self, hidden: Tensor, step: StepInput, result: StepOutput) -> None:
        logits = self.model.compute_logits(hidden[step.buffers["logits_indices"]]).float()
        raw = self._rows_for_logprobs(logits, step)
        token_ids = self.sampler(logits, step, self.batch)
        append_tokens(self.batch.state, step.sampled_rows, token_ids)
        self.batch.count_tokens(step, token_ids)
        result.failed.update(find_dead_ends(step.sampled_requests))
        if raw is not None:
            self._report_logprobs(raw, token_ids.clamp(min=0), step, result)

    def _rows_for_logprobs(self, logits: Tensor, step: StepInput) -> Tensor | None:
        """A copy of the raw logits of the rows that report them: the sampler overwrites."""
        rows = _rows_with_logprobs(step)
        return logits[torch.tensor(rows, device=self.device)] if rows else None

    def _report_logprobs(
        self, raw: Tensor, token_ids: Tensor, step: StepInput, result: StepOutput
    ) -> None:
        rows = _rows_with_logprobs(step)
        requests = [step.sampled_requests[row] for row in rows]
        entries = gather_logprobs(
            raw,
            token_ids[torch.tensor(rows, device=self.device)],
            [request.sampling_params.logprobs or 0 for request in requests],
            [request.sampling_params.logprob_token_ids for request in requests],
        )
        result.logprobs.update(zip(requests, entries, strict=True))

    def _score_prompts(self, hidden: Tensor, output: SchedulerOutput, result: StepOutput) -> None:
        """Log-probabilities of the prompt tokens that follow the ones computed in this step."""
        offset = 0
        for item in output.scheduled:
            request, num_tokens = item.request, item.num_scheduled_tokens
            begin, offset = offset, offset + num_tokens
            num_wanted = request.sampling_params.prompt_logprobs
            start = request.num_computed_tokens
            stop = min(start + num_tokens, request.num_prompt_tokens - 1)
            if num_wanted is None or start >= stop or request.prompt_logprobs[start + 1 :]:
                continue  # not asked for, past the prompt, or known from before a preemption
            entries: list[PositionLogprobs] = []
            for first in range(start, stop, _PROMPT_LOGPROBS_ROWS):
                last = min(first + _PROMPT_LOGPROBS_ROWS, stop)
                rows = hidden[begin + first - start : begin + last - start]
                targets = torch.tensor(request.token_ids[first + 1 : last + 1], device=self.device)
                logits = self.model.compute_logits(rows).float()
                entries += gather_logprobs(logits, targets, [num_wanted] * (last - first))
            result.prompt_logprobs[request] = entries


def _rows_with_logprobs(step: StepInput) -> list[int]:
    return [
        row
        for row, request in enumerate(step.sampled_requests)
        if request.sampling_params.logprobs is not None
        or request.sampling_params.logprob_token_ids is not None
    ]
