"""EncoderRunner: runs an encoder on the texts of a step, each from its beginning to its end."""

from __future__ import annotations

import time
from array import array

import numpy as np
import torch

from nbllm.engine.batch import RING
from nbllm.engine.pending_step import PendingStep, StepOutput
from nbllm.engine.runner import Runner
from nbllm.engine.scheduler_output import SchedulerOutput
from nbllm.models import Encoder


class EncoderRunner(Runner[Encoder]):
    """See `Runner`. Nothing of a text is left for later steps, so the batch's tables stay empty."""

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> PendingStep:
        """Enqueue a step: the hidden states of whole texts, an embedding each."""
        launched = time.monotonic()
        with self._on_stream():
            text_lens = [item.num_scheduled_tokens for item in output.scheduled]
            token_ids = array("I")
            for item in output.scheduled:
                assert item.num_scheduled_tokens == item.request.num_tokens
                token_ids += item.request.token_ids
            positions = np.concatenate([np.arange(length) for length in text_lens])
            input_ids, positions_t = self.batch.to_device(np.asarray(token_ids), positions)
            hidden = self.model(input_ids, positions_t, text_lens)
            pooled = self.pooler.pool(hidden, output)
            generated = input_ids.new_empty(0, RING)
            return self._pend(
                PendingStep(output, [], generated, None, pooled, None, StepOutput(), launched)
            )
