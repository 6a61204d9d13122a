"""What completions and chat completions have in common: their fields, their bounds, their errors.

Source: OpenAI's API reference, and the parameters that vLLM adds to it.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nbllm.errors import InvalidRequestError
from nbllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
)
from nbllm.server.response_format import JsonFormat, structured_outputs_params

_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
logger = logging.getLogger(__name__)

MAX_DEPTH = 64  # of a request's JSON
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_IDS = 16_384
_MAX_MESSAGE_CHARS = 400  # of an error
_GREEDY_BELOW, _MIN_TEMPERATURE = 1e-5, 0.01

# What the engine packs into 32 and 64 bits.
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Ids = Annotated[list[Int32], Field(max_length=MAX_LOGIT_BIAS)]
StopText = Annotated[str, Field(max_length=1024)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]

# Fields that SamplingParams has under the same name; one that is left out has the model's default.
_SAMPLING_FIELDS = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "logit_bias",
    "allowed_token_ids",
    "thinking_token_budget",
)


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RepetitionDetection(BaseModel):
    """As `RepetitionDetectionParams`."""

    model_config = ConfigDict(strict=True)

    max_pattern_size: Int32 = 0
    min_pattern_size: Int32 = 0
    min_count: Int32 = 0


class ServerRequest(BaseModel):
    """A body; unknown fields are ignored, as vLLM does, and null is the same as left out."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str | None = None


class GenerationRequest(ServerRequest):
    """A request for text."""

    prompt_name: ClassVar[str] = "prompt"  # of the field that holds it

    n: int = Field(default=1, ge=1, le=MAX_N)
    max_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    stop: StopText | Stops | None = None
    stop_token_ids: Ids | None = None
    bad_words: Stops | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int32 | None = None
    prompt_logprobs: int | None = Field(default=None, ge=-1, le=MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    allowed_token_ids: Annotated[list[Int32], Field(max_length=MAX_ALLOWED_IDS)] | None = None
    thinking_token_budget: Int32 | None = None
    repetition_detection: RepetitionDetection | None = None
    response_format: JsonFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    use_beam_search: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    priority: Int32 = 0
    request_id: str | None = Field(default=None, max_length=128)
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream has the usage so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """How to sample.

        Args:
            defaults: the model's own; its `max_tokens` is a limit for everybody, as in vLLM.

        Raises:
            InvalidRequestError: it can't be sampled like that.
        """
        self._refuse_unsupported()
        given = self.model_fields_set
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS if name in given}
        if _GREEDY_BELOW <= values.get("temperature", 0.0) < _MIN_TEMPERATURE:
            values["temperature"] = _MIN_TEMPERATURE  # SamplingParams does that with a warning
        if self.repetition_detection is not None:
            values["repetition_detection"] = RepetitionDetectionParams(
                **self.repetition_detection.model_dump()
            )
        limits = [n for n in (self.token_limit(), defaults.max_tokens) if n is not None]
        values |= self.logprobs_params()
        return defaults.clone(
            max_tokens=min(limits, default=None),
            structured_outputs=structured_outputs_params(
                self.response_format, self.structured_outputs
            ),
            extra_args=self.vllm_xargs,
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
            **values,
        )

    def name_of(self, parameter: str | None) -> str | None:
        """What the client calls a parameter of `LLM.generate`."""
        if parameter == "structured_outputs" and self.structured_outputs is None:
            return "response_format"
        return self.prompt_name if parameter in ("prompts", "prompt_token_ids") else parameter

    def token_limit(self) -> int | None:
        """Most tokens that the client wants; None is as many as fit."""
        return self.max_tokens

    def logprobs_params(self) -> dict[str, int | None]:
        """`logprobs`, and maybe `prompt_logprobs`, of the SamplingParams."""
        return {}

    def _refuse_unsupported(self) -> None:
        if self.use_beam_search:
            raise InvalidRequestError(
                "use_beam_search is not supported here; LLM.beam_search() is",
                parameter="use_beam_search",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is for stream=true", parameter="stream_options"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError(
                "prompt_logprobs can't be streamed", parameter="prompt_logprobs"
            )


Request_ = TypeVar("Request_", bound=ServerRequest)


def parse_request(body: bytes, kind: type[Request_]) -> Request_:
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
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if value is not None}
        unknown = data.keys() - kind.model_fields.keys()
        if unknown:
            logger.debug("fields that are ignored: %.200s", ", ".join(sorted(unknown)))
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:2]) or "body"
        parameter = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"{where:.100}: {message}", parameter=parameter) from error


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
    """OpenAI's form of an error; a message that repeats the request is cut."""
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[:_MAX_MESSAGE_CHARS] + "..."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


def to_json(data: Any) -> bytes:
    """JSON in ASCII: half of a surrogate pair, which a client may send, is no UTF-8."""
    return _encoder.encode(data).encode("ascii")
