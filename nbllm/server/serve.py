"""serve: an OpenAI-compatible server in a thread of this process."""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbllm.errors import InvalidRequestError
from nbllm.notebook_cell import current_cell
from nbllm.server.app import make_app
from nbllm.server.card import is_proxied
from nbllm.server.cell_servers import CellServers, Trace
from nbllm.server.door import Door
from nbllm.server.handle import Server
from nbllm.server.listen import (
    LOCAL_NAMES,
    WILDCARDS,
    Address,
    Tls,
    check_origins,
    check_root_path,
    in_url,
)

if TYPE_CHECKING:
    from nbllm.llm import LLM

logger = logging.getLogger(__name__)

_cell_servers = CellServers()


def serve(
    llm: LLM,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | Sequence[str] | None = "auto",
    model_name: str | None = None,
    allowed_hosts: Sequence[str] | None = None,
    max_concurrent_requests: int = 1024,
    metrics_prefix: str = "nbllm",
    tool_call_parser: str | None = "auto",
    reasoning_parser: str | None = None,
    enable_prompt_tokens_details: bool = False,
    uds: str | Path | None = None,
    ssl_keyfile: str | Path | None = None,
    ssl_certfile: str | Path | None = None,
    ssl_ca_certs: str | Path | None = None,
    root_path: str = "",
    allowed_origins: Sequence[str] | None = None,
) -> Server:
    """Serve OpenAI's API from this process; returns once it listens.

    A notebook cell that is run again replaces the server of its earlier run, on the same port and
    with the same key if both were chosen here.

    Args:
        llm: what answers, beside its other callers.
        host: address to listen on; the default is reached from this machine only.
        port: 0 takes a free one.
        api_key: "auto" makes one, see `Server.api_key`; several let each of them in; None lets
            everybody in.
        model_name: default that of the `LLM`.
        allowed_hosts: names, without the port, under which browsers and clients may address the
            server; "*" is any. By default any for an address that is open to others, or behind
            JupyterHub, as there must be a key; else those of this machine, so that no web page can
            reach the server under a name of its own.
        max_concurrent_requests: further ones get the status 429.
        metrics_prefix: of the names in /metrics; "vllm" is what existing dashboards read.
        tool_call_parser: hermes, llama3_json, mistral, openai or pythonic, whatever the model
            writes its tool calls in; "auto" goes by its chat template.
        reasoning_parser: deepseek_r1 or qwen3 sets reasoning apart from the answer.
        enable_prompt_tokens_details: tell clients how much of a prompt was cached.
        uds: path of a Unix socket to listen on instead of a port; only this user may connect. Its
            file goes with the server. One that is no socket is never replaced.
        ssl_certfile, ssl_keyfile: PEM files of a certificate and its key; the server speaks HTTPS.
        ssl_ca_certs: PEM file of authorities; clients must show a certificate of one of them.
        root_path: path under which a proxy shows the server, as "/models/llm".
        allowed_origins: of web pages that may ask the server (CORS), as "https://nb.example"; "*"
            is any. By default none.

    Raises:
        InvalidRequestError: there is no such parser, the address can't be bound, an open address
            has no key, or a file is missing; `parameter` is its name.
    """
    if max_concurrent_requests < 1:
        raise InvalidRequestError(
            "max_concurrent_requests must be at least 1", parameter="max_concurrent_requests"
        )
    if metrics_prefix not in ("nbllm", "vllm"):
        raise InvalidRequestError("must be 'nbllm' or 'vllm'", parameter="metrics_prefix")
    tls = Tls.choose(ssl_keyfile, ssl_certfile, ssl_ca_certs)
    address = Address.choose(host, port, uds, tls)
    cell = current_cell()
    keys = _check_keys(api_key, address)
    origins = check_origins(allowed_origins, has_key=bool(keys))
    root_path = check_root_path(root_path)
    replaced = _cell_servers.replaced_by(cell)
    if api_key == "auto":
        old_key = None if replaced is None else replaced.api_key
        keys = [old_key or secrets.token_urlsafe(24)]
    name = model_name or llm.model_name
    app = make_app(
        llm,
        api_key=keys or None,
        hosts=_allowed_names(address, allowed_hosts, has_key=bool(keys)),
        model_name=name,
        max_concurrent_requests=max_concurrent_requests,
        metrics_prefix=metrics_prefix,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        enable_prompt_tokens_details=enable_prompt_tokens_details,
        root_path=root_path,
        origins=origins,
    )
    first_key = keys[0] if keys else None
    options = {"api_key": first_key, "model_name": name}
    server = _make_server(app, address, port, replaced, **options)
    made_key = first_key if api_key == "auto" else None
    _cell_servers.add(cell, Trace(server.port, made_key, weakref.ref(server)))
    logger.info("%s %s", "replaced by" if replaced else "serving on", server.base_url)
    return server


def _make_server(
    app: Door, address: Address, port: int, replaced: Trace | None, **options: Any
) -> Server:
    if replaced is not None and replaced.port and port == 0 and address.uds is None:
        try:
            return Server(app, address, replaced.port, replaces=True, **options)
        except InvalidRequestError:  # somebody else has it by now
            logger.info("port %d is taken; another one is used", replaced.port)
    return Server(app, address, port, replaces=replaced is not None, **options)


def _check_keys(api_key: str | Sequence[str] | None, address: Address) -> list[str]:
    if api_key is None:
        if not address.is_local:
            raise InvalidRequestError(f"{address.host!r} needs an api_key", parameter="api_key")
        return []
    keys = [api_key] if isinstance(api_key, str) else list(api_key)
    if not keys or not all(isinstance(key, str) and key.strip() and key.isascii() for key in keys):
        raise InvalidRequestError("must be ASCII text, not empty, or None", parameter="api_key")
    return keys


def _allowed_names(
    address: Address, allowed_hosts: Sequence[str] | None, *, has_key: bool
) -> frozenset[str] | None:
    if allowed_hosts is not None:
        if isinstance(allowed_hosts, str):
            raise InvalidRequestError("must be a list of names", parameter="allowed_hosts")
        names = {in_url(name.lower()) for name in allowed_hosts}
        return None if "*" in names else LOCAL_NAMES | names
    # A proxy's name is not known here; a page that rebinds its own name does not know the key.
    if has_key and (address.uds is not None or address.host in WILDCARDS or is_proxied()):
        return None
    return LOCAL_NAMES | {in_url(address.host.lower())}
