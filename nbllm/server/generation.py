"""From prompts to an HTTP response, whole or streamed: what completions and chats share."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Send

from nbllm.errors import InvalidRequestError, NbllmError, RequestFailedError
from nbllm.server.errors import json_response, stream_error
from nbllm.server.protocol import GenerationRequest, to_json

if TYPE_CHECKING:
    from nbllm.outputs import RequestOutput
    from nbllm.sampling_params import SamplingParams
    from nbllm.server.request_log import RequestRecord
    from nbllm.server.service import Service

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it
_MAX_ID_CHARS = 128
# Proxies must pass each event on when it comes.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _HasRequestId(Protocol):
    request_id: str | None


class TokenCounts:
    """Adds up how many tokens went in and came out.

    Args:
        with_cached: tell how many came from the prefix cache.
    """

    def __init__(self, *, with_cached: bool = False) -> None:
        self._with_cached = with_cached
        self._prompts: dict[int, tuple[int, int]] = {}  # number -> tokens, and those cached
        self._new: dict[int, int] = {}  # number -> tokens

    @property
    def prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(num for num, _ in self._prompts.values())

    @property
    def completion(self) -> int:
        """Tokens generated."""
        return sum(self._new.values())

    def completion_of(self, number: int) -> int:
        """Tokens generated for prompt `number`."""
        return self._new.get(number, 0)

    def add(self, number: int, output: RequestOutput, *, count_new: bool = True) -> None:
        """Count what is new in an output of prompt `number`."""
        self._prompts[number] = len(output.prompt_token_ids), output.num_cached_tokens
        if count_new:
            new = sum(len(choice.token_ids) for choice in output.outputs)
            self._new[number] = self.completion_of(number) + new

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }
        if self._with_cached:
            cached = sum(num for _, num in self._prompts.values())
            body["prompt_tokens_details"] = {"cached_tokens": cached}
        return body


class Reply(ABC):
    """Writes the reply to one request.

    Args:
        service: what the routes share.
        request: what was asked for.
        request_id: of this reply, without the prefix.
        whole_object: what a reply that is not streamed calls itself.
        stream_object: what a chunk calls itself.
        id_prefix: of the id.
    """

    counts_new_tokens = True

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        request_id: str,
        *,
        whole_object: str,
        stream_object: str,
        id_prefix: str,
    ) -> None:
        self.id = id_prefix + request_id
        self.counts = TokenCounts(with_cached=service.enable_prompt_tokens_details)
        self._whole_object = whole_object
        self._stream_object = stream_object
        self._head = {"id": self.id, "created": int(time.time()), "model": service.model_name}
        self._include_usage = request.include_usage
        self._continuous_usage = request.continuous_usage

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The reply that is not streamed."""
        choices: list[dict[str, Any]] = []
        extra: dict[str, Any] = {}
        for number, output in enumerate(outputs):
            self.add(number, output)
            extra |= self.whole_extra(output)
            choices += self.choices(number, output)
        return {
            **self._head,
            "object": self._whole_object,
            "choices": choices,
            "usage": self.counts.usage(),
            **extra,
        }

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The chunks of a stream for what is new in prompt `number`."""
        self.add(number, output)
        for choice in self.deltas(number, output):
            yield self._chunk([choice], self.counts.usage() if self._continuous_usage else None)

    def last_chunk(self) -> dict[str, Any] | None:
        """The chunk with the usage, if it was asked for."""
        return self._chunk([], self.counts.usage()) if self._include_usage else None

    def add(self, number: int, output: RequestOutput) -> None:
        """Count the tokens of an output."""
        self.counts.add(number, output, count_new=self.counts_new_tokens)

    @abstractmethod
    def choices(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The choices of prompt `number` as they are in the whole reply."""

    @abstractmethod
    def deltas(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The choices of chunks for what is new in prompt `number`."""

    def event(self, data: dict[str, Any]) -> bytes:
        """A chunk as it is sent."""
        return b"data: " + to_json(data) + b"\n\n"

    def failure(self, error: Exception) -> Iterator[dict[str, Any]]:
        """The chunks that end a stream whose status was sent before."""
        yield stream_error(error)

    def whole_extra(self, output: RequestOutput) -> dict[str, Any]:
        """Further fields of the whole reply."""
        return {}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = {**self._head, "object": self._stream_object, "choices": choices}
        return body | {"usage": usage} if self._include_usage else body


def request_id(request: Request, parsed: _HasRequestId) -> str:
    """The client's id for its request, from the header or the body, or a random one."""
    given = request.headers.get("x-request-id") or parsed.request_id or ""
    return given[:_MAX_ID_CHARS] if given.isprintable() and given.strip() else uuid.uuid4().hex


async def answer(
    service: Service,
    request: Request,
    parsed: GenerationRequest,
    prompts: Sequence[Any],
    params: SamplingParams,
    reply: Reply,
) -> Response:
    """Generate for all prompts at once, and write the reply as it was asked for."""
    record = service.record_of(request)
    record.id = reply.id
    try:
        return await _answer(service, request, parsed, prompts, params, reply)
    except (InvalidRequestError, RequestFailedError) as error:
        error.parameter = parsed.name_of(error.parameter)
        raise


async def _answer(
    service: Service,
    request: Request,
    parsed: GenerationRequest,
    prompts: Sequence[Any],
    params: SamplingParams,
    reply: Reply,
) -> Response:
    record = service.record_of(request)
    if params.structured_outputs is not None:  # a grammar may take a second to compile
        await asyncio.to_thread(service.llm.prepare, params)
    if parsed.stream:
        events = _chunks(service, prompts, params, parsed.priority, reply, record)
        # The first chunk is awaited here, so that a request that is wrong has its own status.
        first = await unless_disconnected(request, anext(events))
        if first is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return _EventStream(_events(first, events, reply), headers=_STREAM_HEADERS)
    work = _generate(service, prompts, params, parsed.priority)
    outputs = await unless_disconnected(request, work)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    body = reply.whole(outputs)
    record.count(reply.counts.prompt, reply.counts.completion)
    return json_response(body)


class _EventStream(StreamingResponse):
    """A response that ends the engine's work at once when the client leaves."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast("AsyncGenerator[bytes, None]", self.body_iterator)):
            await super().stream_response(send)


async def _generate(
    service: Service, prompts: Sequence[Any], params: SamplingParams, priority: int
) -> list[RequestOutput]:
    """All prompts at once; the first that fails ends the others and raises."""
    outputs: dict[int, RequestOutput] = {}
    async with aclosing(_stream_all(service, prompts, params, priority)) as stream:
        async for number, output in stream:
            outputs[number] = output
    return [outputs[number] for number in range(len(prompts))]


async def _chunks(
    service: Service,
    prompts: Sequence[Any],
    params: SamplingParams,
    priority: int,
    reply: Reply,
    record: RequestRecord,
) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(_stream_all(service, prompts, params, priority)) as stream:
        async for number, output in stream:
            for chunk in reply.chunks(number, output):
                yield chunk
            record.count(reply.counts.prompt, reply.counts.completion)
    last = reply.last_chunk()
    if last is not None:
        yield last


async def _stream_all(
    service: Service, prompts: Sequence[Any], params: SamplingParams, priority: int
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """`(number of the prompt, output)` of all prompts as they come."""
    if len(prompts) == 1:
        async with aclosing(_stream(service, prompts[0], params, priority)) as stream:
            async for output in stream:
                yield 0, output
        return
    # One place only: while the client is slow, the engine's tokens gather in larger deltas.
    queue: asyncio.Queue[tuple[int, RequestOutput] | None] = asyncio.Queue(1)
    failures: list[Exception] = []

    async def follow(number: int, prompt: Any) -> None:
        async with aclosing(_stream(service, prompt, params, priority)) as stream:
            async for output in stream:
                await queue.put((number, output))

    tasks = [asyncio.create_task(follow(i, prompt)) for i, prompt in enumerate(prompts)]

    async def finish() -> None:
        try:
            await asyncio.gather(*tasks)
        except Exception as error:
            failures.append(error)
        await queue.put(None)

    end = asyncio.create_task(finish())
    try:
        while (item := await queue.get()) is not None:
            if failures:
                break
            yield item
        if failures:
            raise failures[0]
    finally:
        for task in (*tasks, end):
            task.cancel()


async def _stream(
    service: Service, prompt: Any, params: SamplingParams, priority: int
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of one prompt, which are measured as they pass."""
    observer = service.metrics.follow(params)
    stream = service.llm.astream(prompt, params, priority=priority)
    async with aclosing(cast("AsyncGenerator[RequestOutput, None]", stream)) as outputs:
        async for output in outputs:
            observer.add(output)
            yield output


async def _events(
    first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], reply: Reply
) -> AsyncIterator[bytes]:
    yield reply.event(first)
    try:
        async for chunk in chunks:
            yield reply.event(chunk)
    except Exception as error:  # the status is sent: the error can only be an event
        if not isinstance(error, NbllmError):
            logger.exception("a stream failed")
        for chunk in reply.failure(error):
            yield reply.event(chunk)
    yield b"data: [DONE]\n\n"


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T | None:
    """Await `work`; None if the client has gone away, which ends it."""
    task = asyncio.ensure_future(work)
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if not has_left:
            task.cancel()
            raise
        return None
    finally:
        watcher.cancel()
