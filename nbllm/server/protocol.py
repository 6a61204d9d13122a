"""What OpenAI's clients send, as far as the server understands it, and what they get back.

Source: the API reference of OpenAI (completions, chat completions) and vLLM's additions to it.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nbllm.errors import InvalidRequestError
from nbllm.outputs import CompletionOutput, RequestOutput
from nbllm.sampling_params import RequestOutputKind, SamplingParams

MAX_DEPTH = 64  # of a request's JSON


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat completions share; unknown fields are ignored, as at OpenAI."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError for what can't be sampled."""
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams(
            n=self.n,
            max_tokens=self.token_limit(),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            logit_bias=self.logit_bias,  # type: ignore[arg-type]  # it takes digits for ids
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=self.num_logprobs(),
            output_kind=kind,
        )

    def token_limit(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        return None


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16  # OpenAI's default
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def num_logprobs(self) -> int | None:
        return self.logprobs


class ChatCompletionRequest(GenerationRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def parse_request(body: bytes, kind: type[GenerationRequest]) -> Any:
    """The request in a body.

    Raises:
        InvalidRequestError: no JSON, not finite numbers, too deep, or not of the right form; the
            message never repeats the body.
    """
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("the body is not valid JSON") from error
    if _depth(data) > MAX_DEPTH:
        raise InvalidRequestError(f"the JSON is nested more than {MAX_DEPTH} deep")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:2]) or "body"
        parameter = str(first["loc"][0]) if first["loc"] else None
        raise InvalidRequestError(f"{where}: {first['msg']}", parameter=parameter) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [
            child
            for item in nested
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def error_body(message: str, status: int, parameter: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


class Reply:
    """Makes the replies to one request, whole or in chunks.

    Args:
        model: the model's name.
        is_chat: chat completions, or plain ones.
    """

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The reply that is not streamed."""
        choices: list[dict[str, Any]] = []
        for output in outputs:
            for completion in output.outputs:
                choice: dict[str, Any] = {
                    "index": len(choices),
                    "finish_reason": completion.finish_reason,
                    "logprobs": self._logprobs(completion),
                }
                if self._is_chat:
                    choice["message"] = {"role": "assistant", "content": completion.text}
                else:
                    choice["text"] = completion.text
                choices.append(choice)
        return {
            **self._head,
            "object": self._kind,
            "choices": choices,
            "usage": usage(outputs, _count(outputs)),
        }

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat: its role."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}})

    def delta(self, completion: CompletionOutput) -> dict[str, Any]:
        """A chunk with what is new in one choice."""
        choice: dict[str, Any] = {"index": completion.index}
        if self._is_chat:
            choice["delta"] = {"content": completion.text}
        else:
            choice["text"] = completion.text
        choice["logprobs"] = self._logprobs(completion)
        choice["finish_reason"] = completion.finish_reason
        return self._chunk(choice)

    def usage_chunk(self, output: RequestOutput, num_tokens: int) -> dict[str, Any]:
        """The last chunk, if it was asked for."""
        return {**self._chunk(None), "usage": usage([output], num_tokens)}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        if choice is not None:
            choice = {"finish_reason": None, **choice}
        return {**self._head, "object": kind, "choices": [] if choice is None else [choice]}

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        positions = []
        for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            ranked = [_entry(i, entry) for i, entry in entries.items()]
            positions.append({**_entry(token_id, entries[token_id]), "top_logprobs": ranked})
        if self._is_chat:
            return {"content": positions}
        return {
            "tokens": [position["token"] for position in positions],
            "token_logprobs": [position["logprob"] for position in positions],
            "top_logprobs": [
                {entry["token"]: entry["logprob"] for entry in position["top_logprobs"]}
                for position in positions
            ],
        }


def usage(outputs: list[RequestOutput], num_tokens: int) -> dict[str, int]:
    """How many tokens went in and came out."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }


def _count(outputs: list[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


def _entry(token_id: int, entry: Any) -> dict[str, Any]:
    token = entry.decoded_token if entry.decoded_token is not None else f"token_id:{token_id}"
    value = max(entry.logprob, -9999.0)  # JSON has no infinity
    return {"token": token, "logprob": value, "bytes": list(token.encode("utf-8", "replace"))}
