"""`nbllm complete`: a server goes on with what is typed."""

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
    """The options of `nbllm complete`."""
    add_client_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Complete each line until the input ends; returns 0."""
    client, model = make_client(arguments)
    options = {} if arguments.max_tokens is None else {"max_tokens": arguments.max_tokens}

    def pieces(line: str) -> Any:
        stream: Any = client.completions.create(model=model, prompt=line, stream=True, **options)
        return (chunk.choices[0].text for chunk in stream if chunk.choices)

    with client:
        for line in read_turns(arguments):
            write_pieces(piece for piece in pieces(line))
    return 0
