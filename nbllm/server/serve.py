"""serve: an OpenAI-compatible server in a thread of this process.

The thread has an event loop of its own; no signal handler, log file or standard stream is touched.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Any

import uvicorn

from nbllm.errors import InvalidRequestError, NbllmError
from nbllm.server.app import make_app

if TYPE_CHECKING:
    from nbllm.llm import LLM

logger = logging.getLogger(__name__)

_LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]"})


class _UvicornServer(uvicorn.Server):
    """uvicorn that says when it is ready."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class Server:
    """A running server; also a context manager that stops it.

    Attributes:
        url: where it listens.
        base_url: what OpenAI's clients want: `OpenAI(base_url=..., api_key=...)`.
        api_key: the key, or None.
    """

    def __init__(self, llm: LLM, host: str, port: int, api_key: str | None, model: str) -> None:
        self.api_key = api_key
        self._socket = _bind(host, port)
        port = self._socket.getsockname()[1]
        self.url = f"http://{host}:{port}"
        self.base_url = self.url + "/v1"
        app = make_app(llm, api_key=api_key, hosts=_LOCAL | {host.lower()}, model_name=model)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        self._server = _UvicornServer(config)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nbllm-server", daemon=True)
        self._thread.start()
        self._server.ready.wait(30)
        if not self._server.started:
            raise NbllmError(f"the server did not start on {self.url}") from self._error

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop listening; requests that run get two seconds to end. Idempotent."""
        self._server.should_exit = True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

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
        state = self.base_url if self.is_running else "stopped"
        return f"Server({state}, key in .api_key)" if self.api_key else f"Server({state})"

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
    api_key: str | None = "auto",
    model_name: str | None = None,
) -> Server:
    """Serve OpenAI's API from this process; returns once it listens.

    Args:
        llm: what answers, beside its other callers.
        host: address to listen on; the default is reached from this machine only.
        port: 0 takes a free one.
        api_key: "auto" makes one, see `Server.api_key`; None lets everybody in.
        model_name: default that of the `LLM`.

    Raises:
        InvalidRequestError: the address can't be bound, or an open address has no key.
    """
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise InvalidRequestError(f"{host} needs an api_key", parameter="api_key")
    if api_key == "auto":
        api_key = secrets.token_urlsafe(24)
    server = Server(llm, host, port, api_key, model_name or llm.model_name)
    logger.info("serving %s on %s", llm.model_name, server.base_url)
    return server


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket of our own: no other process can take the port in between."""
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InvalidRequestError(
            f"{host}:{port} can't be bound ({error.strerror}); pass another port, or 0 for a "
            "free one",
            parameter="port",
        ) from error
    return bound
