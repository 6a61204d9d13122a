"""What all routes share: the `LLM`, its name, the log and the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from nbllm.errors import PromptTooLongError
from nbllm.server.errors import ModelNotFoundError
from nbllm.server.protocol import ServerRequest
from nbllm.server.request_log import RequestLog, RequestRecord
from nbllm.server.tools import Parsers

if TYPE_CHECKING:
    from nbllm.llm import LLM
    from nbllm.server.metrics import ServerMetrics

RECORD = "nbllm.record"  # in the scope of a request


@dataclass(frozen=True, slots=True)
class Service:
    """One `LLM` as it is served.

    Attributes:
        llm: answers; it may serve cells and frames at the same time.
        model_name: what clients call it.
        log: of the requests.
        metrics: of the requests and the engine.
        parsers: of the texts of chats.
        enable_prompt_tokens_details: tell clients how much of a prompt was cached.
    """

    llm: LLM
    model_name: str
    log: RequestLog
    metrics: ServerMetrics
    parsers: Parsers
    enable_prompt_tokens_details: bool = False

    def check_model(self, request: ServerRequest) -> None:
        """Raises ModelNotFoundError if a request names another model."""
        if request.model not in (None, "", self.model_name):
            raise ModelNotFoundError(f"the model here is {self.model_name!r}", parameter="model")

    def check_fits(self, text: str, parameter: str) -> None:
        """Find what is far too long before it is tokenized, which may take seconds.

        Raises:
            PromptTooLongError: it has more characters than `max_model_len` tokens may have.
        """
        max_model_len = self.llm.config.max_model_len
        most = self.llm.get_tokenizer().max_token_chars
        if most is not None and max_model_len is not None and len(text) > most * max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(text)} characters, more than max_model_len={max_model_len} "
                "tokens can stand for: shorten it",
                parameter=parameter,
            )

    def record_of(self, request: Request) -> RequestRecord:
        """The record that the door has begun for a request."""
        record: RequestRecord = request.scope[RECORD]
        return record
