"""`nbllm chat`: a conversation with a server."""

from __future__ import annotations

import argparse
from typing import Any

from nbllm.server.commands.client import (
    add_client_arguments,
    make_client,
    read_turns,
    write_pieces,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm chat`."""
    add_client_arguments(parser)
    parser.add_argument("--system-prompt", help="how the model should answer")


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends; returns 0."""
    client, model = make_client(arguments)
    messages: list[Any] = []
    if arguments.system_prompt is not None:
        messages.append({"role": "system", "content": arguments.system_prompt})
    options = {} if arguments.max_tokens is None else {"max_tokens": arguments.max_tokens}

    def pieces() -> Any:
        stream: Any = client.chat.completions.create(
            model=model, messages=messages, stream=True, **options
        )
        return (chunk.choices[0].delta.content for chunk in stream if chunk.choices)

    with client:
        for line in read_turns(arguments):
            messages.append({"role": "user", "content": line})
            answer = write_pieces(piece for piece in pieces())
            messages.append({"role": "assistant", "content": answer})
    return 0
