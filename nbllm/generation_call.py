"""GenerationCall: an `EngineCall` whose rows become texts."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from nbllm.engine.request import FinishReason
from nbllm.engine_call import EngineCall, check_errors
from nbllm.inputs import EncodedPrompt
from nbllm.output_processor import OutputProcessor, count_cut_texts, error_output
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nbllm.engine.engine_thread import EngineThread
    from nbllm.engine.request import Request
    from nbllm.request_factory import RequestFactory
    from nbllm.tokenizer import Tokenizer

Row: TypeAlias = tuple[object, SamplingParams, int]
"""A prompt as the user wrote it, its sampling parameters, its priority."""


class GenerationCall(EngineCall[SamplingParams, RequestOutput]):
    """Rows in, `(row number, RequestOutput)` out.

    Args:
        rows, encode, thread, max_in_flight: as in `EngineCall`.
        factory: makes the requests.
        tokenizer: for the texts, or None.
        output_kind: FINAL_ONLY yields each row once; otherwise each change of a row.

    Raises:
        InvalidRequestError: the model is an encoder.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        encode: Callable[[list[object]], list[EncodedPrompt]],
        factory: RequestFactory,
        thread: EngineThread,
        tokenizer: Tokenizer | None,
        max_in_flight: int,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> None:
        factory.check_generates()
        super().__init__(
            rows,
            encode=encode,
            thread=thread,
            max_in_flight=max_in_flight,
            reports_changes=output_kind != RequestOutputKind.FINAL_ONLY,
        )
        self._factory = factory
        self._tokenizer = tokenizer
        self._output_kind = output_kind

    def token_counts(self, output: RequestOutput) -> dict[str, int]:
        """See `EngineCall.token_counts`."""
        return {
            "failed": int(output.error is not None),
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "tokens": sum(len(completion.token_ids) for completion in output.outputs),
        }

    def begun(self) -> dict[int, list[array[int]]]:
        """Token ids that each row in flight has generated, of each continuation; from any thread.

        A row that reports log-probabilities is left out: it could not go on without those of the
        tokens before. Of a continuation that has ended the last token is, which ends it again.
        """
        rows = {}
        for number, processor in self._untaken.copy().items():
            assert isinstance(processor, OutputProcessor)
            requests = processor.requests
            if not any(r.reports_logprobs or r.reads_hidden_states for r in requests):
                rows[number] = [_generated(request) for request in requests]
        return rows

    def _begin(
        self, row: EncodedPrompt, params: SamplingParams, priority: int
    ) -> tuple[list[Request], OutputProcessor]:
        made = self._factory.make(row, params, priority=priority, streaming=self._reports_changes)
        return made, OutputProcessor(row, made, params, self._tokenizer, self._output_kind)

    def _error_output(self, request_id: str, row: EncodedPrompt, error: Exception) -> RequestOutput:
        return error_output(request_id, row, error)


def _generated(request: Request) -> array[int]:
    has_end = request.is_finished and request.finish_reason is not FinishReason.ABORT
    token_ids = request.token_ids[request.num_prompt_tokens :]
    return token_ids[:-1] if has_end else token_ids


def check_outputs(
    outputs: list[RequestOutput], is_single: bool, max_model_len: int | None
) -> list[RequestOutput]:
    """Raise the error of a single prompt; warn of what a list of outputs might hide.

    Args:
        outputs: finished.
        is_single: the user gave one prompt, not a list.
        max_model_len: texts that fill it end in the middle of a sentence, most likely.
    """
    check_errors(outputs, is_single, stacklevel=4)
    assert max_model_len is not None
    num_cut = count_cut_texts(outputs, max_model_len)
    if num_cut:
        warnings.warn(
            f"{num_cut} text(s) ended by length: prompt and text filled "
            f"max_model_len={max_model_len}; set max_tokens or stop, or raise max_model_len",
            stacklevel=3,
        )
    return outputs
