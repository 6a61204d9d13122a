"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from nbllm.errors import InvalidRequestError
from nbllm.outputs import CompletionOutput, RequestOutput
from nbllm.server.generation import Reply, answer, request_id
from nbllm.server.logprobs import LogprobsWriter, prompt_logprobs_body
from nbllm.server.messages import template_messages
from nbllm.server.protocol import MAX_LOGPROBS, GenerationRequest, ServerRequest, parse_request
from nbllm.server.service import Service
from nbllm.server.tool_parsers import Delta, gather
from nbllm.server.tools import ChoiceParser, ToolChoice, read_choice


class ChatTemplateRequest(ServerRequest):
    """What decides how messages are rendered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False  # templates bring their own
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = Field(default=None, max_length=16)

    def template_options(self) -> dict[str, Any]:
        """Arguments for `LLM.render_chat`.

        Raises:
            InvalidRequestError: the client brings a template of its own.
        """
        if self.chat_template is not None:
            raise InvalidRequestError(
                "a chat template must come from the server's owner: LLM(chat_template=...)",
                parameter="chat_template",
            )
        variables = dict(self.chat_template_kwargs or {})
        if self.documents is not None:
            variables.setdefault("documents", self.documents)
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        opens_turn = self.add_generation_prompt
        return {
            "tools": self.tools or None,
            "add_generation_prompt": not self.continue_final_message
            if opens_turn is None
            else opens_turn,
            "continue_final_message": self.continue_final_message,
            "chat_template_kwargs": variables,
        }


class ChatCompletionRequest(GenerationRequest, ChatTemplateRequest):
    """The body of /v1/chat/completions."""

    prompt_name: ClassVar[str] = "messages"

    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    echo: bool = False

    def token_limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def logprobs_params(self) -> dict[str, int | None]:
        return {"logprobs": self.top_logprobs or 0} if self.logprobs else {}

    def check(self) -> None:
        """Raises InvalidRequestError for what is not done here."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", parameter="top_logprobs")


class _ChoiceReader:
    """Reads the text of one choice.

    Args:
        parser: of what it holds; None takes all for content.

    Attributes:
        num_calls: tool calls that were found.
    """

    def __init__(self, parser: ChoiceParser | None) -> None:
        self._parser = parser
        self.num_calls = 0

    def read(self, completion: CompletionOutput) -> list[Delta]:
        """What is new in a choice, and at its end all that was held back."""
        deltas = read_choice(self._parser, completion)
        for delta in deltas:
            if delta.call is not None:
                self.num_calls += (delta.call.id is not None) - delta.call.withdrawn
        return deltas


def _delta_body(delta: Delta) -> dict[str, Any]:
    if delta.call is not None:
        call = delta.call
        if call.withdrawn:  # OpenAI's protocol has no word for that
            return {}
        function: dict[str, Any] = {"arguments": call.arguments}
        body: dict[str, Any] = {"index": call.index, "function": function}
        if call.id is not None:
            body |= {"id": call.id, "type": "function"}
            function["name"] = call.name
        return {"tool_calls": [body]}
    return {"reasoning": delta.reasoning} if delta.reasoning else {"content": delta.content}


class ChatReply(Reply):
    """Writes the reply to a chat."""

    def __init__(
        self,
        service: Service,
        request: ChatCompletionRequest,
        reply_id: str,
        tool_choice: ToolChoice,
    ) -> None:
        super().__init__(
            service,
            request,
            reply_id,
            whole_object="chat.completion",
            stream_object="chat.completion.chunk",
            id_prefix="chatcmpl-",
        )
        self._request = request
        self._mode = tool_choice.mode
        self._make_parser = partial(tool_choice.parser, service.parsers)
        self._make_parser()  # raises for what can't be read
        self._readers: dict[int, _ChoiceReader] = {}
        self._writer: LogprobsWriter | None = None
        if request.logprobs:
            self._writer = LogprobsWriter(
                service.llm.get_tokenizer(),
                request.top_logprobs or 0,
                tokens_as_ids=request.return_tokens_as_token_ids,
            )
        last = template_messages(request.messages[-1:])[0]
        is_echoed = request.echo and last["role"] == "assistant"
        self._echo = last["content"] if is_echoed else ""

    def choices(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        for completion in output.outputs:
            reader = self._reader(completion.index)
            parsed = gather(reader.read(completion))
            message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
            if not parsed.calls or parsed.content is not None:
                message["content"] = self._echo + (parsed.content or "")
            if parsed.reasoning is not None:
                message["reasoning"] = parsed.reasoning
            if parsed.calls:
                message["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in parsed.calls
                ]
            yield {
                "index": completion.index,
                "message": message,
                **self._common(completion, reader),
            }

    def deltas(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        for completion in output.outputs:
            index = completion.index
            if index not in self._readers:
                opening = {"role": "assistant", "content": self._echo}
                yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
            reader = self._reader(index)
            bodies = [body for body in map(_delta_body, reader.read(completion)) if body]
            common = self._common(completion, reader)
            for body in bodies[:-1]:  # what is said of the whole piece goes with its last part
                nothing = {"logprobs": None, "finish_reason": None, "stop_reason": None}
                yield {"index": index, "delta": body, **nothing}
            if bodies or common["logprobs"] or common["finish_reason"]:
                yield {"index": index, "delta": bodies[-1] if bodies else {}, **common}

    def whole_extra(self, output: RequestOutput) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self._request.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        if self._request.return_token_ids:
            extra["prompt_token_ids"] = output.prompt_token_ids
        return extra

    def _reader(self, index: int) -> _ChoiceReader:
        if index not in self._readers:
            self._readers[index] = _ChoiceReader(self._make_parser())
        return self._readers[index]

    def _common(self, completion: CompletionOutput, reader: _ChoiceReader) -> dict[str, Any]:
        logprobs = None
        if self._writer is not None and completion.logprobs is not None:
            logprobs = self._writer.for_chat(completion.token_ids, completion.logprobs)
        reason = completion.finish_reason
        if reason == "stop" and reader.num_calls and self._mode != "named":
            reason = "tool_calls"
        common: dict[str, Any] = {
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": completion.stop_reason,
        }
        if self._request.return_token_ids:
            common["token_ids"] = completion.token_ids
        return common


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/chat/completions."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        parsed = parse_request(await request.body(), ChatCompletionRequest)
        service.check_model(parsed)
        parsed.check()
        choice = ToolChoice.of(
            parsed.tools or None, parsed.tool_choice, parallel=parsed.parallel_tool_calls
        )
        defaults = service.llm.get_default_sampling_params()
        params = choice.sampling_params(parsed.sampling_params(defaults))
        reply = ChatReply(service, parsed, request_id(request, parsed), choice)
        keep = parsed.truncate_prompt_tokens
        prompt = await encode_chat(service, parsed, must_fit=keep in (None, -1))
        if keep is not None and keep >= 0:
            ids = prompt["prompt_token_ids"]
            prompt["prompt_token_ids"] = ids[max(len(ids) - keep, 0) :]
        return await answer(service, request, parsed, [prompt], params, reply)


async def encode_chat(
    service: Service, request: ChatTemplateRequest, *, must_fit: bool = True
) -> dict[str, Any]:
    """The messages of a request as one prompt; `must_fit` refuses early what is far too long.

    Raises:
        InvalidRequestError: the template refuses them, or there is none.
    """
    messages = template_messages(request.messages)
    options = request.template_options()

    def render() -> dict[str, Any]:
        text = service.llm.render_chat(messages, **options).text
        if must_fit:
            service.check_fits(text, "messages")
        ids = service.llm.get_tokenizer().encode(text, request.add_special_tokens)
        return {"prompt": text, "prompt_token_ids": ids}

    return await asyncio.to_thread(render)  # a template may take its time
