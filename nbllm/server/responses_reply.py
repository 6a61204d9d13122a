"""The reply of /v1/responses: its items, its events, and the response itself."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nbllm.outputs import CompletionOutput, RequestOutput
from nbllm.sampling_params import SamplingParams
from nbllm.server.errors import stream_error
from nbllm.server.generation import Reply
from nbllm.server.protocol import to_json
from nbllm.server.service import Service
from nbllm.server.tool_parsers import Delta
from nbllm.server.tools import ToolChoice, read_choice

if TYPE_CHECKING:
    from nbllm.server.responses import ResponsesRequest

Event = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call"]
_ID_PREFIXES: dict[Kind, str] = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}
_EMPTY_CALL: dict[str, str] = {"call_id": "", "name": ""}


@dataclass
class _Item:
    """One item of the output.

    Attributes:
        kind: its type.
        index: its place in the stream.
        call: `call_id` and `name` of a function_call.
        pieces: of its text, or of its arguments.
        status: as clients see it.
        is_withdrawn: what was taken for a call is none.
    """

    kind: Kind
    index: int
    call: dict[str, str]
    pieces: list[str] = field(default_factory=list)
    status: str = "in_progress"
    is_withdrawn: bool = False

    def __post_init__(self) -> None:
        self.id = _ID_PREFIXES[self.kind] + uuid.uuid4().hex

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def part(self) -> dict[str, Any]:
        """The only part of its content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def body(self) -> dict[str, Any]:
        head = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return head | self.call | {"arguments": self.text}
        content = [] if self.status == "in_progress" else [self.part()]
        kind: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return head | kind | {"content": content}


class OutputItems:
    """The items of an output as it grows, and the events that tell of it.

    A call that is withdrawn ends as an incomplete item of the stream, for there is no event that
    takes it back, and is no part of the response.
    """

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._open_call: int | None = None  # the parser's number

    def bodies(self) -> list[dict[str, Any]]:
        """The items as they are in a response."""
        return [item.body() for item in self._items if not item.is_withdrawn]

    def reasoning(self) -> str:
        """All reasoning."""
        return "".join(item.text for item in self._items if item.kind == "reasoning")

    def add(self, delta: Delta) -> Iterator[Event]:
        """The events of one more piece."""
        piece = delta.call
        if piece is None:
            kind: Kind = "reasoning" if delta.reasoning else "message"
            if self._open is None or self._open.kind != kind:
                yield from self._begin(kind, _EMPTY_CALL)
            yield from self._grow(delta.reasoning or delta.content)
        elif piece.withdrawn:
            if self._open is not None:
                self._open.is_withdrawn = True
            yield from self._end("incomplete")
        else:
            if piece.index != self._open_call:
                call = {"call_id": piece.id or "", "name": piece.name or ""}
                yield from self._begin("function_call", call)
                self._open_call = piece.index
            yield from self._grow(piece.arguments)

    def finish(self, status: str) -> Iterator[Event]:
        """The events at the end; a complete answer without any item gets an empty message."""
        if status == "completed" and all(item.is_withdrawn for item in self._items):
            yield from self._begin("message", _EMPTY_CALL)
        yield from self._end(status)

    def _begin(self, kind: Kind, call: dict[str, str]) -> Iterator[Event]:
        yield from self._end("completed")
        item = self._open = _Item(kind, len(self._items), call)
        self._items.append(item)
        yield {
            "type": "response.output_item.added",
            "output_index": item.index,
            "item": item.body(),
        }
        if kind != "function_call":
            yield _event(item, "response.content_part.added", part=item.part())

    def _grow(self, text: str) -> Iterator[Event]:
        item = self._open
        if item is None or not text:
            return
        item.pieces.append(text)
        yield _event(item, f"{_text_event(item)}.delta", delta=text)

    def _end(self, status: str) -> Iterator[Event]:
        item, self._open, self._open_call = self._open, None, None
        if item is None:
            return
        item.status = status
        if item.kind == "function_call":
            name = item.call["name"]
            yield _event(item, f"{_text_event(item)}.done", arguments=item.text, name=name)
        else:
            yield _event(item, f"{_text_event(item)}.done", text=item.text)
            yield _event(item, "response.content_part.done", part=item.part())
        yield {
            "type": "response.output_item.done",
            "output_index": item.index,
            "item": item.body(),
        }


def _text_event(item: _Item) -> str:
    if item.kind == "function_call":
        return "response.function_call_arguments"
    return f"response.{'reasoning' if item.kind == 'reasoning' else 'output'}_text"


def _event(item: _Item, kind: str, **fields: Any) -> Event:
    """An event inside an item."""
    place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
    if item.kind != "function_call":
        place["content_index"] = 0
    if kind.startswith("response.output_text"):
        place["logprobs"] = []
    return {"type": kind} | place | fields


class ResponsesReply(Reply):
    """Writes a response.

    Args:
        service: what the routes share.
        request: what was asked for.
        params: how it is sampled.
        tool_choice: what is to be called.
        keep: gets the response when it is complete.

    Raises:
        InvalidRequestError: the model's own format of calls is not known.
    """

    def __init__(
        self,
        service: Service,
        request: ResponsesRequest,
        params: SamplingParams,
        tool_choice: ToolChoice,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(
            service,
            request,
            uuid.uuid4().hex,  # never the client's: it is the key to what is kept
            whole_object="response",
            stream_object="response",
            id_prefix="resp_",
        )
        self._service = service
        self._request = request
        self._params = params
        self._keep = keep
        self._parser = tool_choice.parser(service.parsers)
        self._items = OutputItems()
        self._num_events = 0
        self._final: dict[str, Any] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        for _ in self.chunks(0, outputs[0]):
            pass  # the events are for a stream
        return self._final

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self.add(number, output)
        yield from map(self._numbered, self.deltas(number, output))

    def last_chunk(self) -> None:
        return None  # the last event has the usage

    def choices(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        yield from self._items.bodies()

    def deltas(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        if self._num_events == 0:
            for kind in ("response.created", "response.in_progress"):
                yield {"type": kind, "response": self._body("in_progress", [])}
        (completion,) = output.outputs
        for delta in self._read(completion):
            yield from self._items.add(delta)
        reason = completion.finish_reason
        if reason is None:
            return
        status = {"length": "incomplete", "abort": "failed", "error": "failed"}.get(
            reason, "completed"
        )
        yield from self._items.finish("completed" if status == "completed" else "incomplete")
        self._final = self._body(status, list(self.choices(number, output)), self._usage())
        if status == "failed":
            self._final["error"] = {"code": "server_error", "message": "the generation was ended"}
        self._keep(self._final)
        yield {"type": f"response.{status}", "response": self._final}

    def event(self, data: dict[str, Any]) -> bytes:
        return b"event: " + data["type"].encode() + b"\ndata: " + to_json(data) + b"\n\n"

    def failure(self, error: Exception) -> Iterator[dict[str, Any]]:
        yield from map(self._numbered, self._items.finish("incomplete"))
        told = stream_error(error)["error"]
        code = "invalid_prompt" if told["code"] < 500 else "server_error"
        body = self._body("failed", self._items.bodies())
        body["error"] = {"code": code, "message": told["message"]}
        events: list[Event] = [
            {"type": "error", "code": code, "message": told["message"], "param": told["param"]},
            {"type": "response.failed", "response": body},
        ]
        yield from map(self._numbered, events)

    def _numbered(self, event: Event) -> Event:
        numbered = event | {"sequence_number": self._num_events}
        self._num_events += 1
        return numbered

    def _read(self, completion: CompletionOutput) -> list[Delta]:
        deltas = read_choice(self._parser, completion)
        return [delta for delta in deltas if delta.content or delta.reasoning or delta.call]

    def _body(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        asked = self._request
        wanted = asked.text.format
        text_format: dict[str, Any] = {"type": "text"}
        if wanted is not None:
            text_format = wanted.model_dump(by_alias=True, exclude_none=True)
        is_cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._head["created"],
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": self._head["model"],
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": asked.reasoning.model_dump(),
            "store": asked.store,
            "temperature": self._params.temperature,
            "text": {"format": text_format},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": usage,
        }

    def _usage(self) -> dict[str, Any]:
        cached = self.counts.usage().get("prompt_tokens_details", {}).get("cached_tokens", 0)
        reasoning = self._items.reasoning()
        # What was thought is counted by its text: the model's tokens are not told apart.
        tokenizer = self._service.llm.get_tokenizer()
        num_thought = len(tokenizer.encode(reasoning, False)) if reasoning else 0
        return {
            "input_tokens": self.counts.prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self.counts.completion,
            "output_tokens_details": {"reasoning_tokens": num_thought},
            "total_tokens": self.counts.prompt + self.counts.completion,
        }
