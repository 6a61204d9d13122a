"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from nbllm.errors import InvalidRequestError
from nbllm.server.chat import ChatTemplateRequest, encode_chat
from nbllm.server.errors import json_response
from nbllm.server.protocol import Int32, ServerRequest, parse_request
from nbllm.server.service import Service

MAX_TOKENIZED = 1 << 20  # letters or ids, in a second or two


class TokenizeRequest(ChatTemplateRequest):
    """The body of /tokenize: a prompt, or messages."""

    prompt: Annotated[str, Field(max_length=MAX_TOKENIZED)] | None = None
    messages: list[dict[str, Any]] = Field(default=[])
    add_special_tokens: bool | None = None  # type: ignore[assignment]
    return_token_strs: bool = False


class DetokenizeRequest(ServerRequest):
    """The body of /detokenize."""

    tokens: Annotated[list[Int32], Field(max_length=MAX_TOKENIZED)]


def add_routes(app: FastAPI, service: Service) -> None:
    """Add both routes."""
    llm = service.llm

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        parsed = parse_request(await request.body(), TokenizeRequest)
        service.check_model(parsed)
        tokenizer = llm.get_tokenizer()
        if (parsed.prompt is None) == (not parsed.messages):
            raise InvalidRequestError("either prompt or messages, please", parameter="prompt")
        if parsed.prompt is None:
            parsed.add_special_tokens = bool(parsed.add_special_tokens)
            ids = (await encode_chat(service, parsed))["prompt_token_ids"]
        else:
            adds = parsed.add_special_tokens is not False
            ids = await asyncio.to_thread(tokenizer.encode, parsed.prompt, adds)
        strs = tokenizer.convert_ids_to_tokens(ids) if parsed.return_token_strs else None
        body = {
            "count": len(ids),
            "max_model_len": llm.config.max_model_len,
            "tokens": ids,
            "token_strs": strs,
        }
        return await asyncio.to_thread(json_response, body)  # there may be millions

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        parsed = parse_request(await request.body(), DetokenizeRequest)
        service.check_model(parsed)
        vocab_size = llm.model_config.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in parsed.tokens):
            raise InvalidRequestError(
                f"tokens must be in the vocabulary of {vocab_size}", parameter="tokens"
            )
        tokenizer = llm.get_tokenizer()
        text = await asyncio.to_thread(tokenizer.decode, parsed.tokens, False)
        return json_response({"prompt": text})
