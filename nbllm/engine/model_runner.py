"""ModelRunner: runs a model that generates on one step's batch, and samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.batch import RING, StepInput
from nbllm.engine.cuda_graph import GraphCache
from nbllm.engine.decode_loop import DecodeLoop
from nbllm.engine.kv_cache import allocate_kv_caches
from nbllm.engine.logprobs import LogprobReport, report_logprobs, wanted_logprobs
from nbllm.engine.pending_step import PendingStep, StepOutput
from nbllm.engine.pooler import PooledStates
from nbllm.engine.prompt_graphs import MIN_SEQS, PromptGraphs
from nbllm.engine.runner import Runner
from nbllm.engine.sampler import SamplingKind, draw, restrict
from nbllm.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from nbllm.models.causal_lm import CausalLM
from nbllm.outputs import PositionLogprobs
from nbllm_kernels import one_thread

_MAX_LAUNCH_S = 0.02
_REHEARSED_TOKENS = (32, 128)  # few tokens and many take different kernels
_REHEARSED_ROWS = (16, 8, 4, 2)  # for as many the products have kernels of their own
_REHEARSED_KINDS = [
    SamplingKind(any_filter=True),
    SamplingKind(all_greedy=True),
]
# Multiplications of a product for which a second thread is no help; to read a weight takes as long
# as to multiply some rows by it.
_ONE_THREAD_WORK = 6_000_000
_ROWS_OF_A_READ = 8
_PROMPT_LOGPROBS_ROWS = 256  # rows of logits at a time: the vocabulary may be large


class ModelRunner(Runner[CausalLM]):
    """Runs the steps of a model that generates, see `Runner`.

    Args:
        model, model_config, config, device, stream: as in `Runner`.
        kv_cache_dtype: of keys and values, normally the model's dtype.
    """

    def __init__(
        self,
        model: CausalLM,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        device: torch.device,
        kv_cache_dtype: torch.dtype,
        stream: torch.cuda.Stream | None,
    ) -> None:
        super().__init__(model, model_config, config, device=device, stream=stream)
        self.vocab_size = model_config.vocab_size
        self.kv_caches = allocate_kv_caches(
            config, model_config, device=device, dtype=kv_cache_dtype
        )
        on_gpu = device.type == "cuda"
        captures = on_gpu and not config.enforce_eager and model_config.length_rope is None
        self.graphs = GraphCache(is_enabled=captures)
        self.decode_loop = DecodeLoop(model, self.batch, self.kv_caches, self.graphs, model_config)
        self.prompt_graphs = PromptGraphs(
            model, self.batch, self.kv_caches, self.graphs, model_config
        )
        weight_size = model_config.hidden_size * model_config.intermediate_size
        self._one_thread_rows = 0 if on_gpu else _ONE_THREAD_WORK // weight_size
        self.max_steps = RING if captures else 1
        self.max_launch_s = _MAX_LAUNCH_S if captures else None
        self._rehearsing = threading.Lock()
        self._is_released = False

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> PendingStep:
        """Enqueue a step: forward, logits of the last tokens, one sampled token or embedding each.

        Several steps may be pending; they run in their order.
        """
        launched = time.monotonic()
        with self._on_stream(), self._on_threads(output.num_tokens):
            self.batch.update([item.request for item in output.scheduled])
            result, pooled = StepOutput(), None
            if output.only_decodes and self._decodes_on_device(output):
                sampled: Sequence[ScheduledRequest] = output.scheduled
                if output.shapes_logits:
                    rows, hidden = self.decode_loop.forward(output)
                    logprobs = self._sample(hidden, sampled, rows, result)
                else:
                    rows, logprobs = self.decode_loop.run(output)
            else:
                if not self.prompt_graphs.can_run(output):
                    step = self.batch.prepare(output)
                    logprobs, pooled = self._run_eagerly(step, output, result)
                elif output.shapes_logits:
                    step, hidden = self.prompt_graphs.forward(output)
                    logprobs = self._sample(hidden, step.sampled, step.sampled_rows, result)
                else:
                    step, logprobs = self.prompt_graphs.run(output)
                sampled, rows = step.sampled, step.sampled_rows
            # A copy of the rows at this point of the stream: the next step may give them away.
            generated = self.batch.state.generated.index_select(0, rows)
            pending = PendingStep(
                output, sampled, generated, logprobs, pooled, None, result, launched
            )
            return self._pend(pending)

    def rehearsals(self) -> list[Callable[[], None]]:
        """Steps of nobody, and the longest part of one, for the kernels that they compile: what a
        prompt, the tokens after it and the kinds of sampling need. Each may run in any thread."""
        prompts = [partial(self.prompt_graphs.rehearse, n) for n in _REHEARSED_TOKENS]
        steps: list[Callable[[], None]] = [
            *prompts,
            partial(self.decode_loop.rehearse, 1),
            self._rehearse_sampling,
            self.batch.rehearse,
        ]
        return [partial(self._rehearse, step, self._stream) for step in steps]

    def later_rehearsals(self) -> list[Callable[[], None]]:
        """The same for what a batch needs. Each may run in any thread, beside steps of somebody and
        after `release`, which waits for the one that runs; then it does nothing.

        None in float32, of which cuBLAS does the products: in one more thread that would take one
        more handle and workspace, tens of megabytes.
        """
        if next(self.model.parameters()).dtype == torch.float32:
            return []
        stream = None if self._stream is None else torch.cuda.Stream(self.device)
        rehearse = self.decode_loop.rehearse
        steps = [partial(rehearse, _REHEARSED_ROWS[0], shares_prefix=True)]
        steps += [partial(rehearse, num_rows) for num_rows in _REHEARSED_ROWS]

        def run(step: Callable[[], None]) -> None:
            with self._rehearsing:
                if not self._is_released:
                    self._rehearse(step, stream)

        return [partial(run, step) for step in steps]

    @torch.inference_mode()
    def _rehearse(self, step: Callable[[], None], stream: torch.cuda.Stream | None) -> None:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            step()

    def _rehearse_sampling(self) -> None:
        dtype = next(self.model.parameters()).dtype
        logits = torch.zeros(1, self.vocab_size, dtype=dtype, device=self.device)
        rows = torch.tensor([self.batch.null_row], device=self.device)
        for kind in _REHEARSED_KINDS:
            params = kind.tensors(self.batch.state, rows, rows)
            draw(logits, rows, params, kind, self.batch)
        if dtype.itemsize == 2:  # the head of rows with filters has kernels of its own
            in_features = self.model.lm_head.matrix.shape[1]
            for num_rows in (1, MIN_SEQS):
                self.model.compute_logits(logits.new_zeros(num_rows, in_features))

    def _on_threads(self, num_rows: int) -> AbstractContextManager[None]:
        """As many threads as a step of so many tokens has work for."""
        is_small = max(num_rows, _ROWS_OF_A_READ) <= self._one_thread_rows
        return one_thread() if is_small else nullcontext()

    def _decodes_on_device(self, output: SchedulerOutput) -> bool:
        """True if the host need not put tensors together for the forward pass.

        Captured steps score all rows where some report log-probabilities; without capture it is
        better to score those alone.
        """
        return self.graphs.is_enabled or not (output.shapes_logits or output.reports_logprobs)

    def _run_eagerly(
        self, step: StepInput, output: SchedulerOutput, result: StepOutput
    ) -> tuple[LogprobReport | None, PooledStates | None]:
        """A step of any kind; returns what is reported of the sampled tokens, and embeddings."""
        buffers = step.buffers
        if output.num_decodes:
            self.batch.fill_last_tokens(buffers)
        hidden = self.model(
            buffers["input_ids"], buffers["positions"], self.kv_caches, step.attention
        )
        self._score_prompts(hidden, output, result)
        pooled = self.pooler.pool(hidden, output)
        hidden = hidden[buffers["logits_indices"]]
        return self._sample(hidden, step.sampled, step.sampled_rows, result), pooled

    def release(self) -> None:
        """See `Runner.release`."""
        with self._rehearsing:
            self._is_released = True
        super().release()

    def _forget(self) -> None:
        super()._forget()
        del self.decode_loop
        del self.prompt_graphs
        self.graphs.clear()
        del self.graphs

    def _sample(
        self,
        hidden: Tensor,
        sampled: Sequence[ScheduledRequest],
        rows: Tensor,
        result: StepOutput,
    ) -> LogprobReport | None:
        """A token of each row with what the host has to say of its logits.

        Args:
            hidden: [len(sampled), hidden_size].
            sampled, rows: who, and their rows of the tables.
            result: what failed is added.

        Returns:
            what is reported of the tokens, if some row wants that.
        """
        if not sampled:
            return None
        logits = self.model.compute_logits(hidden).float()
        reporting = [row for row, item in enumerate(sampled) if item.request.reports_logprobs]
        index = torch.tensor(reporting, device=self.device)
        raw = logits[index] if reporting else None  # a copy, before the host has its word
        result.failed.update(restrict(logits, sampled))
        kind, state = SamplingKind.of(sampled), self.batch.state
        positions = state.num_tokens[rows].to(torch.int64)
        token_ids = draw(logits, rows, kind.tensors(state, positions, rows), kind, self.batch)
        if raw is None:
            return None
        wanted = [wanted_logprobs(sampled[row].request) for row in reporting]
        return report_logprobs(raw, token_ids[index].clamp(min=0), wanted)

    def _score_prompts(self, hidden: Tensor, output: SchedulerOutput, result: StepOutput) -> None:
        """Log-probabilities of the prompt tokens that follow the ones computed in this step."""
        offset = 0
        for item in output.scheduled:
            request, num_tokens = item.request, item.num_scheduled_tokens
            begin, offset = offset, offset + num_tokens
            num_wanted = request.sampling_params.prompt_logprobs
            start = item.start
            stop = min(start + num_tokens, request.num_prompt_tokens - 1)
            if num_wanted is None or start >= stop or request.prompt_logprobs[start + 1 :]:
                continue  # not asked for, past the prompt, or known from before a preemption
            token_ids = request.token_ids.tolist()
            entries: list[PositionLogprobs] = []
            for first in range(start, stop, _PROMPT_LOGPROBS_ROWS):
                last = min(first + _PROMPT_LOGPROBS_ROWS, stop)
                rows = hidden[begin + first - start : begin + last - start]
                targets = torch.tensor(token_ids[first + 1 : last + 1], device=self.device)
                logits = self.model.compute_logits(rows).float()
                report = report_logprobs(logits, targets, [(num_wanted, None)] * (last - first))
                entries += report.entries()  # now: of a long prompt they would be too many
            result.prompt_logprobs[request] = entries
