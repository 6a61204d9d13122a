"""The application: OpenAI's routes over one `LLM`, and a door in front of them.

The door (`Door`) stands before everything: whoever names another host (DNS rebinding), has no key
or sends too much is turned away before a route sees it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nbllm.errors import EngineClosedError, EngineDeadError, InvalidRequestError, NbllmError
from nbllm.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Reply,
    error_body,
    parse_request,
)

if TYPE_CHECKING:
    from nbllm.llm import LLM
    from nbllm.outputs import RequestOutput
    from nbllm.sampling_params import SamplingParams

MAX_BODY_BYTES = 8 << 20
MAX_PROMPTS = 256

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Door:
    """ASGI middleware: Host, key and size of the body are checked here.

    Args:
        app: what is behind it.
        api_key: what `Authorization: Bearer` must hold; None lets everybody in.
        hosts: names under which the server may be addressed.
    """

    def __init__(self, app: Any, api_key: str | None, hosts: frozenset[str]) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise _BodyTooLargeError
            return message

        await self._app(scope, counted, send)

    def _refuse(self, scope: Message) -> JSONResponse | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].lower()
        if host not in self._hosts:
            return _refusal(403, "this server is not known under that name")
        if self._key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                return _refusal(401, "wrong or missing API key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                return _refusal(415, "the Content-Type must be application/json")
        return None


class _BodyTooLargeError(Exception):
    """Raised by the door into whoever reads the body."""


def make_app(llm: LLM, *, api_key: str | None, hosts: frozenset[str], model_name: str) -> Any:
    """The ASGI application.

    Args:
        llm: answers; it may serve cells and frames at the same time.
        api_key: None lets everybody in.
        hosts: allowed names in `Host`, without the port.
        model_name: what `/v1/models` lists.
    """
    app = FastAPI(title="nbllm", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(NbllmError, _on_error)
    app.add_exception_handler(_BodyTooLargeError, _on_large_body)
    app.add_exception_handler(Exception, _on_error)
    app.add_exception_handler(404, _on_unknown)
    app.add_exception_handler(405, _on_unknown)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if llm.is_healthy() else 503)

    @app.get("/v1/models")
    async def models() -> Any:
        entry = {
            "id": model_name,
            "object": "model",
            "created": 0,
            "owned_by": "nbllm",
            "max_model_len": llm.config.max_model_len,
        }
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        parsed: CompletionRequest = parse_request(await request.body(), CompletionRequest)
        _check_model(parsed, model_name)
        return await _answer(
            llm, request, parsed, _prompts(parsed), Reply(model_name, is_chat=False)
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        parsed: ChatCompletionRequest = parse_request(await request.body(), ChatCompletionRequest)
        _check_model(parsed, model_name)
        # In a thread: a template may take its time.
        prompt = await asyncio.to_thread(llm.encode_chat, parsed.messages, tools=parsed.tools)
        return await _answer(llm, request, parsed, [prompt], Reply(model_name, is_chat=True))

    return Door(app, api_key, hosts)


async def _answer(
    llm: LLM, request: Request, parsed: GenerationRequest, prompts: list[Any], reply: Reply
) -> Response:
    params = parsed.sampling_params()
    if not parsed.stream:
        outputs = await _unless_disconnected(request, _generate(llm, prompts, params))
        return JSONResponse(reply.whole(outputs))
    if len(prompts) > 1:
        raise InvalidRequestError("one prompt at a time can be streamed", parameter="prompt")
    include_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
    is_chat = isinstance(parsed, ChatCompletionRequest)
    chunks = _chunks(llm, prompts[0], params, reply, is_chat, include_usage)
    # The first chunk is awaited here, so that a request that is wrong gets a status of its own.
    first = await anext(chunks)
    return StreamingResponse(_events(first, chunks), media_type="text/event-stream")


async def _generate(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[RequestOutput]:
    """All prompts at once; the first that fails ends the others and raises."""
    tasks = [asyncio.ensure_future(llm.agenerate(prompt, params)) for prompt in prompts]
    try:
        return [output for outputs in await asyncio.gather(*tasks) for output in outputs]
    finally:
        for task in tasks:
            task.cancel()


async def _chunks(
    llm: LLM, prompt: Any, params: SamplingParams, reply: Reply, is_chat: bool, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    opened: set[int] = set()
    num_tokens, last = 0, None
    async for output in llm.astream(prompt, params):
        last = output
        for completion in output.outputs:
            num_tokens += len(completion.token_ids)
            if is_chat and completion.index not in opened:
                opened.add(completion.index)
                yield reply.opening(completion.index)
            if completion.text or completion.logprobs or completion.finish_reason:
                yield reply.delta(completion)
    if include_usage and last is not None:
        yield reply.usage_chunk(last, num_tokens)


async def _events(
    first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[str]:
    yield _event(first)
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except Exception as error:  # the status is sent: the error can only be an event
        yield _event(error_body(_public_message(error), 500))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it if the client goes away."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    finally:
        watcher.cancel()


def _prompts(parsed: CompletionRequest) -> list[Any]:
    prompt = parsed.prompt
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequestError(f"1 to {MAX_PROMPTS} prompts, please", parameter="prompt")
    return prompts


def _check_model(parsed: GenerationRequest, model_name: str) -> None:
    if parsed.model not in (None, model_name):
        raise InvalidRequestError(f"the model here is {model_name!r}", parameter="model")


def _public_message(error: Exception) -> str:
    """What a client may read: our own messages, never a path or a traceback of something else."""
    return str(error) if isinstance(error, InvalidRequestError) else "the request failed"


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    status = 400 if isinstance(error, InvalidRequestError) else 500
    if isinstance(error, (EngineClosedError, EngineDeadError)):
        status = 503
    if isinstance(error, InvalidRequestError) and error.parameter == "model":
        status = 404
    return _refusal(status, _public_message(error), getattr(error, "parameter", None))


async def _on_large_body(request: Request, error: Exception) -> JSONResponse:
    return _refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


async def _on_unknown(request: Request, error: Exception) -> JSONResponse:
    return _refusal(getattr(error, "status_code", 404), "there is no such route")


def _refusal(status: int, message: str, parameter: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, status, parameter), status_code=status)
