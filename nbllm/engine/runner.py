"""Runner: runs steps on one device. Owns the weights, the KV cache and the tables of the batch."""

from __future__ import annotations

import ctypes
import gc
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.batch import Batch
from nbllm.engine.pending_step import PendingStep
from nbllm.engine.pooler import Pooler
from nbllm.engine.scheduler_output import SchedulerOutput
from nbllm.models.model import Model

ModelT = TypeVar("ModelT", bound=Model)


class Runner(ABC, Generic[ModelT]):
    """Runs steps on one device, on one stream if that is a GPU.

    Args:
        model: weights loaded.
        model_config: its shape.
        config: the resolved configuration.
        device: where the model is.
        stream: on which it works; None on a CPU.

    Attributes:
        kv_caches: one per layer that has one.
        max_steps: steps that may run in a row, see `SchedulerOutput.num_steps`.
        max_launch_s: seconds that they should take together, so that a new request need not wait
            long for its turn; None is no bound.
        max_pending_steps: launches that may be enqueued at a time. With two, the device has
            something to do while the host takes a result and schedules what follows.
    """

    def __init__(
        self,
        model: ModelT,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        assert config.max_num_seqs is not None
        assert config.max_model_len is not None
        assert config.block_size is not None
        on_gpu = device.type == "cuda"
        self.model = model
        self.device = device
        self.kv_caches: list[Tensor] = []
        self.batch = Batch(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            vocab_size=model_config.vocab_size,
            device=device,
            batch_invariant=config.batch_invariant,
            needs_prompt_lens=model_config.length_rope is not None,
        )
        self.pooler = Pooler(self.batch)
        self.max_steps = 1
        self.max_launch_s: float | None = None
        self.max_pending_steps = 2 if on_gpu else 1
        self._stream = stream
        self._copy_stream = torch.cuda.Stream(device) if on_gpu else None

    @abstractmethod
    def launch(self, output: SchedulerOutput) -> PendingStep:
        """Enqueue a step. Several may be pending; they run in their order."""

    def rehearsals(self) -> list[Callable[[], None]]:
        """Steps of nobody, for the kernels that they compile. Each may run in any thread."""
        return []

    def later_rehearsals(self) -> list[Callable[[], None]]:
        """The same for what may be compiled beside steps of somebody, and after `release`."""
        return []

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _pend(self, step: PendingStep) -> PendingStep:
        """Send results to the host, beside whatever is enqueued next."""
        if self._stream is None or self._copy_stream is None:
            return step
        self._copy_stream.wait_stream(self._stream)
        with torch.cuda.stream(self._copy_stream):
            step.generated = _to_host(step.generated)
            if step.logprobs is not None:
                step.logprobs.tensors = step.logprobs.tensors.map(_to_host)
            if step.pooled is not None:
                step.pooled.vectors = _to_host(step.pooled.vectors)
            step.event = torch.cuda.Event()
            step.event.record()
        return step

    def release(self) -> None:
        """Drop weights, KV cache and tables, whoever still holds a reference to this object."""
        try:
            # The memory goes to others, who work on other streams.
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            pass  # the device is dead
        self.kv_caches.clear()  # in place: a frame of a traceback may hold the list
        for module in list(self.model.modules()):
            vars(module).clear()  # a traceback may keep a layer alive, but not its weights
        self._forget()
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

    def _forget(self) -> None:
        """Drop the references to all that has tensors."""
        del self.model
        del self.pooler
        del self.batch


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, enqueued on the current stream."""
    tensor.record_stream(torch.cuda.current_stream())  # not reused before the copy is made
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
