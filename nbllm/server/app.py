"""The application: the routes over one `LLM`, and the door in front of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from nbllm import __version__
from nbllm.errors import InvalidRequestError
from nbllm.server import chat, completions, docs, embeddings, responses, tokens
from nbllm.server.door import Door
from nbllm.server.errors import add_error_handlers, json_response, refusal
from nbllm.server.metrics import ServerMetrics
from nbllm.server.protocol import ServerRequest
from nbllm.server.request_log import RequestLog
from nbllm.server.service import Service
from nbllm.server.tools import Parsers

if TYPE_CHECKING:
    from nbllm.llm import LLM

_BODIES: dict[str, type[ServerRequest]] = {  # the routes read them themselves
    "/v1/chat/completions": chat.ChatCompletionRequest,
    "/v1/completions": completions.CompletionRequest,
    "/v1/embeddings": embeddings.EmbeddingRequest,
    "/v1/responses": responses.ResponsesRequest,
    "/tokenize": tokens.TokenizeRequest,
    "/detokenize": tokens.DetokenizeRequest,
}


def make_app(
    llm: LLM,
    *,
    api_key: str | Sequence[str] | None,
    hosts: Collection[str] | None,
    model_name: str,
    max_concurrent_requests: int = 1024,
    metrics_prefix: str = "nbllm",
    tool_call_parser: str | None = "auto",
    reasoning_parser: str | None = None,
    enable_prompt_tokens_details: bool = False,
    root_path: str = "",
    origins: Collection[str] = (),
) -> Door:
    """The ASGI application.

    Args:
        llm: answers; it may serve cells and frames at the same time.
        api_key: one or several, each of which lets in; None lets everybody in.
        hosts: allowed names in `Host`, without the port; None is any.
        model_name: what clients call the model.
        max_concurrent_requests: POST requests that are answered at a time.
        metrics_prefix: of the names in /metrics.
        tool_call_parser: of the model's own format of tool calls; "auto" goes by its template.
        reasoning_parser: sets reasoning apart from the answer, if it is given.
        enable_prompt_tokens_details: tell clients how much of a prompt was cached.
        root_path: under which a proxy shows the server.
        origins: of the web pages that may ask the server.
    """
    service = Service(
        llm,
        model_name,
        RequestLog(),
        ServerMetrics(metrics_prefix, model_name, llm.config),
        Parsers.choose(tool_call_parser, reasoning_parser, _chat_template(llm)),
        enable_prompt_tokens_details,
    )
    app = FastAPI(title="nbllm", version=__version__, docs_url=None, redoc_url=None)
    door = Door(
        app,
        service.log,
        api_keys=[api_key] if isinstance(api_key, str) else api_key or (),
        hosts=hosts,
        max_concurrent_requests=max_concurrent_requests,
        root_path=root_path,
        origins=origins,
        observe=service.metrics.observe_http,
    )
    add_error_handlers(app)
    completions.add_routes(app, service)
    chat.add_routes(app, service)
    embeddings.add_routes(app, service)
    responses.add_routes(app, service)
    tokens.add_routes(app, service)
    _add_state_routes(app, service, door)
    docs.add_routes(app, _BODIES, has_key=bool(api_key))
    return door


def _add_state_routes(app: FastAPI, service: Service, door: Door) -> None:
    llm: LLM = service.llm
    card = _model_card(service)

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        return Response(status_code=200 if llm.is_healthy() else 503)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/load")
    async def load() -> Response:
        return json_response({"server_load": door.num_posts})

    @app.get("/metrics")
    async def metrics() -> Response:
        if not llm.is_healthy():  # it would not answer
            return refusal(503, "the engine is not healthy")
        values = await asyncio.to_thread(llm.get_metrics)
        return Response(service.metrics.text(values), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.model_name:
            return refusal(404, f"the model here is {service.model_name!r}", "model")
        return json_response(card)


def _chat_template(llm: LLM) -> str | None:
    try:
        return llm.chat_template or llm.get_tokenizer().chat_template
    except InvalidRequestError:  # it has no tokenizer
        return None


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "nbllm",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.llm.config.max_model_len,
    }
