"""/v1/responses: OpenAI's Responses API, with conversations that are kept in memory.

Source: OpenAI's API reference, "Responses".
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nbllm.errors import InvalidRequestError
from nbllm.server.chat import ChatTemplateRequest, encode_chat
from nbllm.server.errors import json_response, refusal
from nbllm.server.generation import answer
from nbllm.server.protocol import GenerationRequest, Int64, parse_request, to_json
from nbllm.server.response_format import JsonFormat, JsonSchemaFormat
from nbllm.server.response_items import Items, chat_messages
from nbllm.server.responses_reply import ResponsesReply
from nbllm.server.service import Service
from nbllm.server.tools import ToolChoice

MAX_RESPONSES = 1000  # that are kept
MAX_STORED_BYTES = 64 << 20
_TOOL_FIELDS = ("name", "description", "parameters")
_NAMES = {"messages": "input", "response_format": "text", "max_tokens": "max_output_tokens"}

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class TextFormat(BaseModel):
    """What the text must be like; `strict` makes no difference, a schema is always enforced."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema needs a schema")
        return self


class TextConfig(BaseModel):
    """`text` of a request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format: TextFormat | None = None


class Reasoning(BaseModel):
    """How much to think; the effort goes to the chat template."""

    model_config = ConfigDict(extra="ignore", strict=True)

    effort: str | None = Field(default=None, max_length=16)
    summary: str | None = Field(default=None, max_length=16)


class ResponsesRequest(GenerationRequest):
    """The body of /v1/responses."""

    prompt_name: ClassVar[str] = "input"

    input: str | Items
    instructions: str | None = None
    max_output_tokens: Int64 | None = Field(default=None, ge=1)
    text: TextConfig = Field(default_factory=TextConfig)
    tools: Items | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Field(default_factory=Reasoning)
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(
        default_factory=dict
    )
    store: bool = True
    previous_response_id: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    background: bool = False
    conversation: Any = None
    prompt: Any = None
    truncation: str | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _take_format(self) -> ResponsesRequest:
        wanted = self.text.format
        self.response_format = None
        if wanted is not None:
            schema = JsonSchemaFormat(name=wanted.name, schema=wanted.json_schema)
            self.response_format = JsonFormat(type=wanted.type, json_schema=schema)
        return self

    def token_limit(self) -> int | None:
        return self.max_output_tokens

    def name_of(self, parameter: str | None) -> str | None:
        if parameter == "structured_outputs" and self.structured_outputs is None:
            wanted = self.text.format
            return "tools" if wanted is None or wanted.type == "text" else "text"
        name = super().name_of(parameter)
        return name if name is None else _NAMES.get(name, name)

    def check(self) -> None:
        """Raises InvalidRequestError for what is not done here."""
        includes = self.include or []
        unsupported = {
            "background": self.background,
            "conversation": self.conversation is not None,
            "prompt": self.prompt is not None,
            "truncation": self.truncation not in (None, "disabled"),
            "top_logprobs": bool(self.top_logprobs),
            "include": "message.output_text.logprobs" in includes,
            "n": self.n != 1,
        }
        for name, is_asked_for in unsupported.items():
            if is_asked_for:
                raise InvalidRequestError(f"{name} is not supported here", parameter=name)
        told: dict[str, Any] = {
            "tools": self.tools,
            "tool_choice": self.tool_choice,
            "text": self.text.model_dump(),
        }
        for name, value in told.items():
            json_of(name, value)

    def items(self) -> Items:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return self.input

    def chat_tools(self) -> Items | None:
        """The tools in the form of chats, which templates know.

        Raises:
            InvalidRequestError: one is no function.
        """
        for tool in self.tools or ():
            if tool.get("type") != "function":
                raise InvalidRequestError(
                    "tools: only functions are supported, no built-in tools", parameter="tools"
                )
        return [
            {
                "type": "function",
                "function": {name: tool[name] for name in _TOOL_FIELDS if tool.get(name)},
            }
            for tool in self.tools or ()
        ] or None

    def wanted_tool(self) -> str | dict[str, Any] | None:
        """The choice of tools; auto without any tools is no mistake.

        Raises:
            InvalidRequestError: it names something that is no name.
        """
        wanted = self.tool_choice
        if isinstance(wanted, dict) and not isinstance(wanted.get("name"), str):
            raise InvalidRequestError(
                "tool_choice must be none, auto, required or name a function",
                parameter="tool_choice",
            )
        return None if wanted == "auto" and not self.tools else wanted


def json_of(parameter: str, value: Any) -> bytes:
    """What a client sent, as it is sent back.

    Raises:
        InvalidRequestError: it holds a number beyond all bounds, which Python reads as infinity.
    """
    try:
        return to_json(value)
    except ValueError as error:
        message = f"{parameter}: a number is too large"
        raise InvalidRequestError(message, parameter=parameter) from error


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and what led to it, as JSON, whose size is known.

    Attributes:
        body: the response.
        items: all input of the conversation so far.
    """

    body: bytes
    items: bytes

    def conversation(self) -> Items:
        """All items, those of the response too."""
        items: Items = json.loads(self.items) + json.loads(self.body)["output"]
        return items


class ResponseStore:
    """Responses in memory; those that were not used for the longest time make room.

    Args:
        max_responses: that are kept.
        max_bytes: of all of them.
    """

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Keep a response."""
        self.delete(response_id)
        self._kept[response_id] = response
        self._num_bytes += _size(response)
        while len(self._kept) > self._max_responses or self._num_bytes > self._max_bytes:
            self.delete(next(iter(self._kept)))

    def get(self, response_id: str) -> StoredResponse | None:
        """A response, if it is kept."""
        if response_id in self._kept:
            self._kept.move_to_end(response_id)
        return self._kept.get(response_id)

    def delete(self, response_id: str) -> bool:
        """Forget a response; False if it is not kept."""
        response = self._kept.pop(response_id, None)
        if response is None:
            return False
        self._num_bytes -= _size(response)
        return True


def _size(response: StoredResponse) -> int:
    return len(response.body) + len(response.items)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/responses, and the routes of those that are kept."""
    store = ResponseStore()

    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        parsed = parse_request(await request.body(), ResponsesRequest)
        service.check_model(parsed)
        earlier: Items = []
        if parsed.previous_response_id is not None:
            previous = store.get(parsed.previous_response_id)
            if previous is None:
                return _unknown("previous_response_id")
            earlier = previous.conversation()
        try:
            return await _create(service, store, request, parsed, earlier)
        except InvalidRequestError as error:
            error.parameter = parsed.name_of(error.parameter)
            raise

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        if request.query_params.get("stream") == "true":
            return refusal(400, "a response that is kept can't be streamed", "stream")
        response = store.get(response_id)
        if response is None:
            return _unknown("response_id")
        return Response(response.body, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        if not store.delete(response_id):
            return _unknown("response_id")
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        if store.get(response_id) is None:
            return _unknown("response_id")
        return refusal(400, "only a response in the background can be cancelled", "response_id")


def _unknown(parameter: str) -> Response:
    return refusal(404, f"{parameter}: there is no such response, or it is not kept", parameter)


async def _create(
    service: Service,
    store: ResponseStore,
    request: Request,
    parsed: ResponsesRequest,
    earlier: Items,
) -> Response:
    parsed.check()
    items = earlier + parsed.items()
    items_json = json_of("input", items)
    tools = parsed.chat_tools()
    choice = ToolChoice.of(tools, parsed.wanted_tool(), parallel=parsed.parallel_tool_calls)
    defaults = service.llm.get_default_sampling_params()
    params = choice.sampling_params(parsed.sampling_params(defaults))

    def keep(body: dict[str, Any]) -> None:
        if parsed.store:
            store.put(body["id"], StoredResponse(to_json(body), items_json))

    reply = ResponsesReply(service, parsed, params, choice, keep)
    chat = ChatTemplateRequest(
        messages=chat_messages(items, parsed.instructions),
        tools=tools,
        reasoning_effort=parsed.reasoning.effort,
        chat_template_kwargs=parsed.chat_template_kwargs,
    )
    try:
        prompt = await encode_chat(service, chat)
    except InvalidRequestError as error:
        message = str(error).replace("messages: ", "input: ", 1)
        raise InvalidRequestError(message, parameter=error.parameter) from error
    return await answer(service, request, parsed, [prompt], params, reply)
