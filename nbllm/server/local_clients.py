"""OpenAI's clients for a server of this process."""

from __future__ import annotations

import importlib
from typing import Any

from nbllm.errors import NbllmError
from nbllm.server.listen import Address


def make_client(address: Address, options: dict[str, Any], *, is_async: bool) -> Any:
    """An `openai.OpenAI` or `openai.AsyncOpenAI` with these options, led to `address`.

    Raises:
        NbllmError: the package openai is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise NbllmError("client() needs the package openai: pip install openai") from error
    if "http_client" not in options:
        make_http = openai.DefaultAsyncHttpxClient if is_async else openai.DefaultHttpxClient
        # openai builds on httpx or on its successor, and takes transports of the same only.
        modules = [kind.__module__.split(".")[0] for kind in make_http.__mro__]
        httpx = importlib.import_module(next(name for name in modules if "httpx" in name))
        transport = httpx.AsyncHTTPTransport if is_async else httpx.HTTPTransport
        options = options | {"http_client": make_http(**_http_options(address, transport))}
    return (openai.AsyncOpenAI if is_async else openai.OpenAI)(**options)


def _http_options(address: Address, make_transport: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_env": False}  # a proxy of the environment does not lead here
    verify: Any = True if address.tls is None else address.tls.client_context()
    if address.uds is not None:
        path = str(address.uds)
        options["transport"] = make_transport(uds=path, verify=verify, trust_env=False)
    elif address.tls is not None:
        options["verify"] = verify
    return options
