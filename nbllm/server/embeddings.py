"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from nbllm.errors import InvalidRequestError
from nbllm.pooling_params import PoolingParams
from nbllm.server.completions import encode
from nbllm.server.generation import CLIENT_CLOSED_REQUEST, request_id, unless_disconnected
from nbllm.server.protocol import Int32, ServerRequest, parse_request, to_json
from nbllm.server.service import Service

if TYPE_CHECKING:
    from nbllm.server.request_log import RequestRecord

MAX_INPUTS = 2048  # OpenAI's bound


class EmbeddingRequest(ServerRequest):
    """The body of /v1/embeddings; `input` and what follows is OpenAI's, from `pooling` on ours."""

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Int32, Field(ge=1)] | None = None
    user: str | None = None
    pooling: Literal["cls", "last", "mean"] | None = None  # None: the model's own
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's name of `normalize`
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    add_special_tokens: bool = True
    priority: Int32 = 0
    request_id: str | None = Field(default=None, max_length=128)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many.

        Raises:
            InvalidRequestError: there is none, or there are too many.
        """
        given = self.input
        prompts: list[Any] = [given] if isinstance(given, str) else list(given)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 1 <= len(prompts) <= MAX_INPUTS:
            raise InvalidRequestError(f"1 to {MAX_INPUTS} inputs, please", parameter="input")
        return prompts

    def pooling_params(self) -> PoolingParams:
        """Which vector is wanted."""
        return PoolingParams(
            pooling=self.pooling,
            normalize=self.normalize,
            dimensions=self.dimensions,
            use_activation=self.use_activation,
        )


def add_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/embeddings."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        parsed = parse_request(await request.body(), EmbeddingRequest)
        service.check_model(parsed)
        record = service.record_of(request)
        record.id = f"embd-{request_id(request, parsed)}"
        try:
            # The call cuts, and knows how.
            keep = None if parsed.truncate_prompt_tokens is None else sys.maxsize
            prompts = await encode(service, parsed.prompts(), parsed.add_special_tokens, keep)
            body = await unless_disconnected(request, _answer(service, parsed, prompts, record))
        except InvalidRequestError as error:
            if error.parameter in ("prompt", "prompts", "prompt_token_ids"):
                error.parameter = "input"
            raise
        if body is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(body, media_type="application/json")


async def _answer(
    service: Service, parsed: EmbeddingRequest, prompts: Sequence[Any], record: RequestRecord
) -> bytes:
    """The reply. The first prompt that fails ends the others and raises.

    Each vector is written as it comes, and then it is the others' turn: thousands of them at once
    would keep the event loop for seconds, and take much more memory than their text.
    """
    items = [b""] * len(prompts)
    num_tokens = 0
    call = service.llm.aembed_iter(
        prompts,
        pooling_params=parsed.pooling_params(),
        truncate_prompt_tokens=parsed.truncate_prompt_tokens,
        priority=[parsed.priority] * len(prompts),
    )
    async with aclosing(call) as outputs:
        async for number, output in outputs:
            if output.error is not None:
                raise output.error
            vector: Any = output.outputs.embedding
            if parsed.encoding_format == "base64":
                vector = base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()
            items[number] = to_json({"object": "embedding", "index": number, "embedding": vector})
            num_tokens += len(output.prompt_token_ids)
            record.count(num_tokens, 0)
            service.metrics.observe_embedding(output)
            await asyncio.sleep(0)
    head = {
        "id": record.id,
        "object": "list",
        "created": int(time.time()),
        "model": service.model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return to_json(head)[:-1] + b',"data":[' + b",".join(items) + b"]}"
