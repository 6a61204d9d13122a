"""Who asks: where the requests of a call come from, for whoever watches the engine.

A face says so once, in the context in which it calls the `LLM`; nobody in between hands it on. The
default is code of the user's, a cell most likely.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

request_source: ContextVar[str] = ContextVar("nbllm_request_source", default="cell")
"""Read when a call is made: "cell", "dataframe", "server" or "widget"."""


@contextmanager
def requests_from(source: str) -> Iterator[None]:
    """Calls that are made inside come from `source`; for who does not own the context."""
    token = request_source.set(source)
    try:
        yield
    finally:
        request_source.reset(token)
