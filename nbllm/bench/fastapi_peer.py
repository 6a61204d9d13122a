"""The peer of `nbllm bench --serve`: the streamer of FastAPI and transformers that tutorials show.

Each request has a thread that runs `model.generate`, and a `TextIteratorStreamer` whose pieces a
`StreamingResponse` sends as they come. It does not batch, so each token costs a forward pass.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from nbllm.bench.cpu_times import count_hand_over
from nbllm.hub import resolve_model


class _ChatRequest(BaseModel):
    messages: list[dict[str, str]]
    max_tokens: int = 16


class _CompletionRequest(BaseModel):
    prompt: str
    max_tokens: int = 16


class Streamer:
    """A model of transformers, and its texts piece by piece.

    Args:
        model: folder or name; None is the bundled one.
        device, dtype: "auto" is the GPU if there is one, and the checkpoint's own dtype.
    """

    def __init__(self, model: str | None, device: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = resolve_model(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
        )
        loaded.generation_config.eos_token_id = None  # every text has its full length
        self._model: Any = loaded.to(device).eval()

    def encode_chat(self, messages: list[dict[str, str]]) -> Any:
        """Token ids of shape [1, num_tokens] with their mask."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def encode(self, prompt: str) -> Any:
        """The same of a text."""
        return self.tokenizer(prompt, return_tensors="pt")

    def stream(self, inputs: Any, max_tokens: int) -> Iterator[str]:
        """Greedy text, as a thread of its own generates it."""
        from transformers import TextIteratorStreamer

        streamer: Any = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True
        )

        streamer.put = count_hand_over(streamer.put)

        def generate() -> None:
            try:
                self._model.generate(
                    **inputs.to(self._model.device),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    streamer=streamer,
                )
            except BaseException:
                streamer.end()  # else its reader would wait for ever
                raise

        threading.Thread(target=generate, name="generate").start()
        yield from streamer


def make_app(streamer: Streamer) -> FastAPI:
    """Two routes in OpenAI's shape, streamed only."""
    app = FastAPI()

    def reply(kind: str, pieces: Iterator[dict[str, Any]]) -> StreamingResponse:
        head = {"id": uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": "m"}

        def events() -> Iterator[str]:
            for choice in pieces:
                chunk = head | {"choices": [{"index": 0, "finish_reason": None} | choice]}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions")
    def chat(request: _ChatRequest) -> StreamingResponse:
        inputs = streamer.encode_chat(request.messages)

        def pieces() -> Iterator[dict[str, Any]]:
            for text in streamer.stream(inputs, request.max_tokens):
                yield {"delta": {"content": text}}
            yield {"delta": {}, "finish_reason": "length"}

        return reply("chat.completion.chunk", pieces())

    @app.post("/v1/completions")
    def complete(request: _CompletionRequest) -> StreamingResponse:
        inputs = streamer.encode(request.prompt)

        def pieces() -> Iterator[dict[str, Any]]:
            for text in streamer.stream(inputs, request.max_tokens):
                yield {"text": text}
            yield {"text": "", "finish_reason": "length"}

        return reply("text_completion", pieces())

    return app


def main(argv: Sequence[str]) -> int:
    """Serve until the process is told to end; returns 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args(argv)
    app = make_app(Streamer(arguments.model, arguments.device, arguments.dtype))
    with socket.create_server((arguments.host, arguments.port), backlog=2048) as listening:
        host, port = listening.getsockname()
        sys.stdout.write(f"transformers serves on http://{host}:{port}/v1\n")
        sys.stdout.flush()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        server.run(sockets=[listening])
    return 0
