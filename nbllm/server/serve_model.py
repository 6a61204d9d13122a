"""nbllm.serve: a server for a model, with or without an `LLM` at hand."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM
from nbllm.server.handle import Server
from nbllm.server.serve import serve as serve_llm


def serve(llm_or_name: LLM | str | Path | None = None, **options: Any) -> Server:
    """Serve OpenAI's API from a thread of this process; returns once it listens.

    Args:
        llm_or_name: what answers; or a folder or a name on the hub, whose `LLM` is made here and
            closed when the server stops; or None for the `LLM` of `nbllm.set_default_llm`, else
            the one that was made last, else the bundled model.
        **options: those of `LLM.serve`: port, host, api_key, uds, ...

    Raises:
        InvalidRequestError: it is no `LLM` and no name, or an option has a wrong value.
        ModelLoadError: the model can't be found or read.
        TypeError: there is no such option.
    """
    inspect.signature(serve_llm).bind(llm_or_name, **options)  # before a model is loaded
    if llm_or_name is None:
        return default_llm().serve(**options)
    if isinstance(llm_or_name, LLM):
        return llm_or_name.serve(**options)
    if not isinstance(llm_or_name, (str, Path)):
        raise InvalidRequestError(
            f"must be an LLM or a model's name, not {type(llm_or_name).__name__}",
            parameter="llm_or_name",
        )
    llm = LLM(llm_or_name)
    try:
        server = llm.serve(**options)
    except BaseException:
        llm.close()
        raise
    server.call_on_stop(llm.close)
    return server
