"""ModelRunner: runs the model on one step's batch and samples. Owns the weights and the KV
cache."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.batch import Batch, StepInput
from nbllm.engine.kv_cache import allocate_kv_caches
from nbllm.engine.logprobs import gather_logprobs
from nbllm.engine.request import Request
from nbllm.engine.sampler import Sampler, find_dead_ends
from nbllm.engine.scheduler import SchedulerOutput
from nbllm.errors import RequestFailedError
from nbllm.models.causal_lm import CausalLM
from nbllm.outputs import PositionLogprobs

_PROMPT_LOGPROBS_ROWS = 256  # rows of logits at a time: the vocabulary may be large


@dataclass(slots=True)
class StepOutput:
    """What a step produced.

    Attributes:
        sampled: the new token of each request whose last token was computed.
        logprobs: log-probabilities at the sampled position, for requests that want them.
        prompt_logprobs: those of the prompt tokens that this step scored, likewise.
        failed: requests whose logits were not numbers, or that allow no token.
    """

    sampled: dict[Request, int] = field(default_factory=dict)
    logprobs: dict[Request, PositionLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[PositionLogprobs]] = field(default_factory=dict)
    failed: dict[Request, RequestFailedError] = field(default_factory=dict)


class ModelRunner:
    """Runs steps on one device.

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

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepOutput:
        """Compute one step: forward, logits of the last tokens, one sampled token each."""
        step = self.batch.prepare(output)
        hidden = self.model(step.input_ids, step.positions, self.kv_caches, step.attention)
        result = StepOutput()
        self._score_prompts(hidden, output, result)
        if step.sampled_requests:
            self._sample(hidden, step, result)
        return result

    def release(self) -> None:
        """Drop weights, KV cache and tables, whoever still holds a reference to this object."""
        self.kv_caches.clear()  # in place: a frame of a traceback may hold the list
        for module in list(self.model.modules()):
            vars(module).clear()  # a traceback may keep a layer alive, but not its weights
        del self.model
        del self.batch
        gc.collect()
        if self.device.type == "cuda":
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
        for kv_cache in self.kv_caches:
            for block in blocks:
                kv_cache[:, block].zero_()

    def _sample(self, hidden: Tensor, step: StepInput, result: StepOutput) -> None:
        logits = self.model.compute_logits(hidden[step.logits_indices])
        is_bad = ~torch.isfinite(logits.amax(dim=-1))
        raw = self._rows_for_logprobs(logits, step)
        token_ids = self.sampler(logits, step, self.batch)
        self.batch.append_tokens(step, token_ids)
        result.failed.update(find_dead_ends(step.sampled_requests))
        tokens, bad = torch.stack([token_ids, is_bad.to(torch.int64)]).tolist()
        for request, token_id, failed in zip(step.sampled_requests, tokens, bad, strict=True):
            if failed:
                result.failed[request] = RequestFailedError(
                    "the model computed logits that are not numbers (NaN or infinite): "
                    "the weights are damaged, or overflow in this dtype (try dtype='float32')"
                )
            elif request not in result.failed:
                result.sampled[request] = token_id
        if raw is not None:
            self._report_logprobs(raw, token_ids, step, result)

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
                logits = self.model.compute_logits(rows)
                entries += gather_logprobs(logits, targets, [num_wanted] * (last - first))
            result.prompt_logprobs[request] = entries


def _rows_with_logprobs(step: StepInput) -> list[int]:
    return [
        row
        for row, request in enumerate(step.sampled_requests)
        if request.sampling_params.logprobs is not None
        or request.sampling_params.logprob_token_ids is not None
    ]
