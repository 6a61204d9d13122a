"""EmbeddingCall: an `EngineCall` whose rows become vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from nbllm.engine.request import FinishReason, Request
from nbllm.engine_call import EngineCall
from nbllm.inputs import EncodedPrompt
from nbllm.outputs import EmbeddingOutput, EmbeddingRequestOutput
from nbllm.pooling_params import PoolingParams

if TYPE_CHECKING:
    from nbllm.engine.engine_thread import EngineThread
    from nbllm.request_factory import RequestFactory

_MIN_NORM = 1e-12  # a vector of zeros stays one


class EmbeddingProcessor:
    """Follows the request of one prompt.

    Args:
        row: text and token ids.
        request: of the prompt.
    """

    def __init__(self, row: EncodedPrompt, request: Request) -> None:
        self._row = row
        self._request = request

    @property
    def is_finished(self) -> bool:
        """True once the request has ended: it has no other news."""
        return self._request.is_finished

    def update(self, request: Request, num_output_tokens: int) -> bool:
        """True if the request ended."""
        return request.is_finished

    def report(self) -> EmbeddingRequestOutput:
        """The vector, or the error."""
        request = self._request
        embedding = [] if request.embedding is None else self._finish(request.embedding).tolist()
        return EmbeddingRequestOutput(
            request_id=request.request_id,
            outputs=EmbeddingOutput(embedding),
            prompt_token_ids=self._row.token_ids,
            num_cached_tokens=request.num_cached_tokens,
            prompt=self._row.text,
            metrics=request.metrics,
            error=request.error if isinstance(request.error, Exception) else None,
        )

    def reread(self) -> EmbeddingRequestOutput | None:
        """The report if the request came to its end, else None."""
        request = self._request
        ended = request.is_finished and request.finish_reason is not FinishReason.ABORT
        return self.report() if ended else None

    def _finish(self, vector: np.ndarray) -> np.ndarray:
        params = self._request.pooling_params
        assert params is not None
        vector = vector[: params.dimensions]
        if params.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), _MIN_NORM)
        return vector


class EmbeddingCall(EngineCall[PoolingParams, EmbeddingRequestOutput]):
    """Rows in, `(row number, EmbeddingRequestOutput)` out.

    Args:
        rows, encode, thread, max_in_flight: as in `EngineCall`.
        factory: makes the requests.
        max_prompt_tokens: a prompt that is longer is cut, see `RequestFactory.cut`; None refuses
            what does not fit.
    """

    def __init__(
        self,
        rows: Iterable[tuple[object, PoolingParams, int]],
        *,
        encode: Callable[[list[object]], list[EncodedPrompt]],
        factory: RequestFactory,
        thread: EngineThread,
        max_in_flight: int,
        max_prompt_tokens: int | None,
    ) -> None:
        super().__init__(rows, encode=encode, thread=thread, max_in_flight=max_in_flight)
        self._factory = factory
        self._max_prompt_tokens = max_prompt_tokens

    def token_counts(self, output: EmbeddingRequestOutput) -> dict[str, int]:
        """See `EngineCall.token_counts`."""
        num_tokens = len(output.prompt_token_ids)
        failed = output.error is not None
        return {"failed": int(failed), "tokens": 0 if failed else num_tokens}

    def _begin(
        self, row: EncodedPrompt, params: PoolingParams, priority: int
    ) -> tuple[list[Request], EmbeddingProcessor]:
        keep = self._max_prompt_tokens
        if keep is not None and len(row.token_ids) > keep:
            row = EncodedPrompt(None, self._factory.cut(row.token_ids, keep), row.error)
        request = self._factory.make_pooling(row, params, priority=priority)
        return [request], EmbeddingProcessor(row, request)

    def _error_output(
        self, request_id: str, row: EncodedPrompt, error: Exception
    ) -> EmbeddingRequestOutput:
        return EmbeddingRequestOutput(
            request_id=request_id,
            outputs=EmbeddingOutput([]),
            prompt_token_ids=row.token_ids,
            prompt=row.text,
            error=error,
        )
