"""What `nbllm chat` and `nbllm complete` share: a client of a server that runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nbllm.errors import NbllmError

if TYPE_CHECKING:
    import openai


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and what is said to it."""
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of a running server")
    parser.add_argument("--model-name", help="default: the first that the server lists")
    parser.add_argument("--api-key", help="default: $NBLLM_API_KEY, $OPENAI_API_KEY or none")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="say this, print the answer, end")


def make_client(arguments: argparse.Namespace) -> tuple[openai.OpenAI, str]:
    """A client, and the model's name.

    Raises:
        NbllmError: the client's library is missing, or no server answers; says what to do.
    """
    try:
        import openai
    except ImportError as error:
        raise NbllmError("this command needs the openai package: pip install openai") from error
    environment = os.environ.get
    key = arguments.api_key or environment("NBLLM_API_KEY") or environment("OPENAI_API_KEY")
    client = openai.OpenAI(base_url=arguments.url, api_key=key or "none", max_retries=0)
    name = arguments.model_name
    try:
        name = name or client.models.list().data[0].id
    except openai.OpenAIError as error:
        raise NbllmError(
            f"no server answers at {arguments.url} ({error}): start one with `nbllm serve`, "
            "or pass --url and --api-key"
        ) from error
    return client, name


def read_turns(arguments: argparse.Namespace) -> Iterator[str]:
    """What the user says: once with --quick, else line by line up to the end of the input."""
    if arguments.quick is not None:
        yield arguments.quick
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip():
            yield line


def write_pieces(pieces: Iterable[str | None]) -> str:
    """Write an answer as it comes; returns the whole of it.

    Raises:
        NbllmError: the server refused, or broke off.
    """
    import openai

    whole = ""
    try:
        for piece in pieces:
            whole += piece or ""
            sys.stdout.write(piece or "")
            sys.stdout.flush()
    except openai.OpenAIError as error:
        raise NbllmError(str(error)) from error
    finally:
        sys.stdout.write("\n")
    return whole
