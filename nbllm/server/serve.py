"""serve: an OpenAI-compatible server in a thread of this process.

The thread has an event loop of its own; no signal handler, log file or standard stream is touched.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import secrets
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from nbllm.errors import InvalidRequestError, NbllmError
from nbllm.notebook_cell import current_cell
from nbllm.server.app import make_app
from nbllm.server.card import card, proxy_path
from nbllm.server.cell_servers import CellServers, Trace
from nbllm.server.connection import Connection
from nbllm.server.door import Door
from nbllm.server.request_log import ServerStats

if TYPE_CHECKING:
    import openai
    import pandas as pd

    from nbllm.llm import LLM

logger = logging.getLogger(__name__)
# Else what uvicorn has to say goes to the cell that runs, if nobody has set logging up.
logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())

_LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]"})
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # and how to reach them

_KEEP_ALIVE_S = 75  # longer than clients keep theirs, so that they don't find one closed
_JOIN_S = 10.0  # for what is cancelled to end

_cell_servers = CellServers()


class _UvicornServer(uvicorn.Server):
    """uvicorn that says when it is ready."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class Server:
    """A running server; also a context manager that stops it. `serve` makes them.

    Args:
        app: what answers.
        host, port: where to listen; port 0 takes a free one.
        api_key: the key that clients of this process use, or None.
        model_name: what clients call the model.
        replaces: whether it took the place of a server of the cell's earlier run.

    Attributes:
        url: where it listens.
        base_url: what OpenAI's clients want: `OpenAI(base_url=..., api_key=...)`.
        port: a number, also if a free port was asked for.
        proxy_path: path of the server behind JupyterHub and jupyter-server-proxy, or None.
        api_key: the key, or None.
        model_name: what clients call the model.
    """

    def __init__(
        self,
        app: Door,
        host: str,
        port: int,
        *,
        api_key: str | None,
        model_name: str,
        replaces: bool = False,
    ) -> None:
        self.api_key = api_key
        self.model_name = model_name
        self._app = app
        self._host = host
        self._replaces = replaces
        self._lock = threading.Lock()  # one restart at a time
        self._start(port)

    def client(self, **options: Any) -> openai.OpenAI:
        """An `openai.OpenAI` for this server; `options` are those of its constructor.

        Raises:
            NbllmError: the package openai is not installed.
        """
        package = _import_openai()
        if "http_client" not in options:  # a proxy of the environment does not lead here
            options["http_client"] = package.DefaultHttpxClient(trust_env=False)
        return package.OpenAI(**self._client_options(options))

    def aclient(self, **options: Any) -> openai.AsyncOpenAI:
        """The same as an `openai.AsyncOpenAI`."""
        package = _import_openai()
        if "http_client" not in options:
            options["http_client"] = package.DefaultAsyncHttpxClient(trust_env=False)
        return package.AsyncOpenAI(**self._client_options(options))

    def requests(self) -> pd.DataFrame:
        """The last thousand requests, the oldest first: id, route, status, started, seconds and
        tokens. `/health` is not among them."""
        return self._app.log.frame()

    @property
    def stats(self) -> ServerStats:
        """Sums over all requests so far."""
        return self._app.log.stats

    def stop(self, timeout_s: float = 2.0) -> None:
        """Stop listening; requests that run get `timeout_s` seconds to end. Idempotent."""
        self._server.config.timeout_graceful_shutdown = math.ceil(timeout_s)
        self._server.should_exit = True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s + _JOIN_S)

    def restart(self) -> None:
        """Stop, and listen again on the same port with the same key.

        Raises:
            InvalidRequestError: the port is taken by now.
        """
        with self._lock:
            self.stop()
            self._start(self.port)

    @property
    def is_running(self) -> bool:
        """False once it is stopped."""
        return self._thread.is_alive()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        # The key is left out: what a cell shows is saved with the notebook.
        state = [self.base_url if self.is_running else "stopped"]
        if self.api_key:
            state.append("key in .api_key")
        if self._replaces:
            state.append("replaces that of this cell's earlier run")
        return f"Server({', '.join(state)})"

    def _repr_html_(self) -> str:
        state = "running" if self.is_running else "stopped"
        if self._replaces:
            state += " in place of this cell's earlier server"
        has_key = self.api_key is not None
        return card(self.base_url, self.model_name, self.port, has_key=has_key, state=state)

    def _client_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": self.base_url, "api_key": self.api_key or "none"} | options

    def _start(self, port: int) -> None:
        self._socket = _bind(self._host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{_in_url(_WILDCARDS.get(self._host, self._host))}:{self.port}"
        self.base_url = self.url + "/v1"
        self.proxy_path = proxy_path(self.port)
        config = uvicorn.Config(
            self._app,
            http=Connection,
            timeout_keep_alive=_KEEP_ALIVE_S,
            log_config=None,
            proxy_headers=False,
            access_log=False,
            lifespan="off",
            server_header=False,
        )
        self._server = _UvicornServer(config)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nbllm-server", daemon=True)
        self._thread.start()
        self._server.ready.wait(30)
        if not self._server.started:
            raise NbllmError(f"the server did not start on {self.url}") from self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except BaseException as error:
            self._error = error
            logger.exception("the server failed")
        finally:
            self._socket.close()
            self._server.ready.set()


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

    Raises:
        InvalidRequestError: there is no such parser, the address can't be bound, or an open
            address has no key.
    """
    if max_concurrent_requests < 1:
        raise InvalidRequestError(
            "max_concurrent_requests must be at least 1", parameter="max_concurrent_requests"
        )
    if metrics_prefix not in ("nbllm", "vllm"):
        raise InvalidRequestError("must be 'nbllm' or 'vllm'", parameter="metrics_prefix")
    cell = current_cell()
    keys = _check_keys(api_key, host)
    replaced = _cell_servers.replaced_by(cell)
    if api_key == "auto":
        old_key = None if replaced is None else replaced.api_key
        keys = [old_key or secrets.token_urlsafe(24)]
    app = make_app(
        llm,
        api_key=keys or None,
        hosts=_allowed_names(host, allowed_hosts, has_key=bool(keys)),
        model_name=model_name or llm.model_name,
        max_concurrent_requests=max_concurrent_requests,
        metrics_prefix=metrics_prefix,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        enable_prompt_tokens_details=enable_prompt_tokens_details,
    )
    first_key = keys[0] if keys else None
    options = {"api_key": first_key, "model_name": model_name or llm.model_name}
    server = _make_server(app, host, port, replaced, **options)
    made_key = first_key if api_key == "auto" else None
    _cell_servers.add(cell, Trace(server.port, made_key, weakref.ref(server)))
    logger.info("%s %s", "replaced by" if replaced else "serving on", server.base_url)
    return server


def _make_server(app: Door, host: str, port: int, replaced: Trace | None, **options: Any) -> Server:
    if replaced is not None and port == 0:
        try:
            return Server(app, host, replaced.port, replaces=True, **options)
        except InvalidRequestError:  # somebody else has it by now
            logger.info("port %d is taken; another one is used", replaced.port)
    return Server(app, host, port, replaces=replaced is not None, **options)


def _check_keys(api_key: str | Sequence[str] | None, host: str) -> list[str]:
    if api_key is None:
        if not _is_loopback(host):
            raise InvalidRequestError(f"{host!r} needs an api_key", parameter="api_key")
        return []
    keys = [api_key] if isinstance(api_key, str) else list(api_key)
    if not keys or not all(isinstance(key, str) and key.strip() and key.isascii() for key in keys):
        raise InvalidRequestError("must be ASCII text, not empty, or None", parameter="api_key")
    return keys


def _allowed_names(
    host: str, allowed_hosts: Sequence[str] | None, *, has_key: bool
) -> frozenset[str] | None:
    if allowed_hosts is not None:
        if isinstance(allowed_hosts, str):
            raise InvalidRequestError("must be a list of names", parameter="allowed_hosts")
        names = {_in_url(name.lower()) for name in allowed_hosts}
        return None if "*" in names else _LOCAL | names
    # A hub's name is not known here; a page that rebinds its own name does not know the key.
    if has_key and (host in _WILDCARDS or proxy_path(0) is not None):
        return None
    return _LOCAL | {_in_url(host.lower())}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _in_url(host: str) -> str:
    """IPv6 addresses stand in brackets, in URLs and in the Host header."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise NbllmError("client() needs the package openai: pip install openai") from error
    return openai


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket of our own: no other process can take the port in between."""
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(
            f"{host}:{port} can't be bound ({reason}); pass another port, or 0 for a free one",
            parameter="port",
        ) from error
    return bound
