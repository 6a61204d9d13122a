"""Server: the handle of a server that runs in a thread of this process.

The thread has an event loop of its own; no signal handler, log file or standard stream is touched.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn

from nbllm.errors import NbllmError
from nbllm.server.card import card, proxy_path, requests_line, requests_table
from nbllm.server.connection import Connection
from nbllm.server.door import Door
from nbllm.server.listen import Address
from nbllm.server.live_card import LiveCard
from nbllm.server.local_clients import make_client
from nbllm.server.log_lines import describe
from nbllm.server.request_log import ServerStats

if TYPE_CHECKING:
    import openai
    import pandas as pd

logger = logging.getLogger(__name__)
# Else what uvicorn has to say goes to the cell that runs, if nobody has set logging up.
logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())

_KEEP_ALIVE_S = 75  # longer than clients keep theirs, so that they don't find one closed
_JOIN_S = 10.0  # for what is cancelled to end
_NUM_SHOWN = 8  # requests in the card


class _UvicornServer(uvicorn.Server):
    """uvicorn that says when it is ready, and takes a Unix socket's file away."""

    def __init__(self, config: uvicorn.Config, address: Address) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._address.release()  # while it listens: a file there is still its own
        for listener in sockets or ():
            try:  # closing it is not enough: a process that was forked meanwhile has it, too
                listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not on every system
        await super().shutdown(sockets)


class Server:
    """A running server; also a context manager that stops it. `serve` makes them.

    Args:
        app: what answers.
        address, port: where to listen; port 0 takes a free one.
        api_key: the key that clients of this process use, or None.
        model_name: what clients call the model.
        replaces: whether it took the place of a server of the cell's earlier run.

    Attributes:
        url: where it listens; over a Unix socket it is "http://localhost", and the client must be
            told of the socket, as `client()` is.
        base_url: what OpenAI's clients want: `OpenAI(base_url=..., api_key=...)`.
        port: a number, also if a free port was asked for; 0 with a Unix socket.
        uds: path of the Unix socket, or None.
        proxy_path: path of the server behind JupyterHub and jupyter-server-proxy, or None.
        api_key: the key, or None.
        model_name: what clients call the model.
    """

    def __init__(
        self,
        app: Door,
        address: Address,
        port: int,
        *,
        api_key: str | None,
        model_name: str,
        replaces: bool = False,
    ) -> None:
        self.api_key = api_key
        self.model_name = model_name
        self._app = app
        self._address = address
        self.uds = None if address.uds is None else str(address.uds)
        self._replaces = replaces
        self._lock = threading.Lock()  # one restart at a time
        self._on_stop: Callable[[], None] | None = None
        self._is_final = False
        self._card = LiveCard(self._card_bundle, self._requests_bundle)
        self._start(port)

    def client(self, **options: Any) -> openai.OpenAI:
        """An `openai.OpenAI` for this server; `options` are those of its constructor.

        If clients must show a certificate (`ssl_ca_certs`), pass an `http_client` that does.

        Raises:
            NbllmError: the package openai is not installed.
        """
        return make_client(self._address, self._client_options(options), is_async=False)

    def aclient(self, **options: Any) -> openai.AsyncOpenAI:
        """The same as an `openai.AsyncOpenAI`."""
        return make_client(self._address, self._client_options(options), is_async=True)

    def requests(self) -> pd.DataFrame:
        """The last thousand requests, the oldest first: id, route, status, started, seconds and
        tokens. `/health` is not among them."""
        return self._app.log.frame()

    @property
    def stats(self) -> ServerStats:
        """Sums over all requests so far."""
        return self._app.log.stats

    def logs(self, n: int = 200) -> list[str]:
        """The last `n` lines of this server's log, the oldest first; 5,000 are kept.

        It has its starts and stops, and for each request that ended the id, the route, the status,
        the seconds, the tokens of the prompt + those of the reply, and the error if there was one.
        """
        return self._app.log.lines.tail(n)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Stop listening; requests that run get `timeout_s` seconds to end. Idempotent."""
        self._halt(timeout_s)
        function, self._on_stop = self._on_stop, None
        if function is not None:
            self._is_final = True
            function()

    def call_on_stop(self, function: Callable[[], None]) -> None:
        """Have `function` called once after `stop`; the server can't be restarted after it."""
        self._on_stop = function

    def restart(self) -> None:
        """Stop, and listen again on the same port with the same key.

        Raises:
            InvalidRequestError: the port is taken by now.
            NbllmError: the `LLM` was made for this server, and closed with it.
        """
        with self._lock:
            if self._is_final:
                raise NbllmError("the model was closed with its server: call nbllm.serve() again")
            self._halt(2.0)
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
        if self.uds is not None:
            state.append(f"over the Unix socket {self.uds}")
        if self.api_key:
            state.append("key in .api_key")
        if self._replaces:
            state.append("replaces that of this cell's earlier run")
        return f"Server({', '.join(state)})"

    def _ipython_display_(self) -> None:
        self._card.show()

    def _card_bundle(self) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _requests_bundle(self) -> dict[str, str]:
        stats = self.stats
        table = requests_table(stats, self._app.log.recent(_NUM_SHOWN))
        return {"text/plain": f"Requests: {requests_line(stats)}", "text/html": table}

    def _repr_html_(self) -> str:
        state = "running" if self.is_running else "stopped"
        if self._replaces:
            state += " in place of this cell's earlier server"
        has_key = self.api_key is not None
        return card(
            self.base_url, self.model_name, self.port, has_key=has_key, state=state, uds=self.uds
        )

    def _client_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": self.base_url, "api_key": self.api_key or "none"} | options

    def _halt(self, timeout_s: float) -> None:
        self._server.config.timeout_graceful_shutdown = math.ceil(timeout_s)
        self._server.should_exit = True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s + _JOIN_S)

    def _start(self, port: int) -> None:
        self._socket = self._address.bind(port)
        self.port: int = self._socket.getsockname()[1] if self.uds is None else 0
        self.url = self._address.url(self.port)
        self.base_url = self.url + "/v1"
        self.proxy_path = proxy_path(self.port) if self.uds is None else None
        tls = self._address.tls
        config = uvicorn.Config(
            self._app,
            http=Connection,
            timeout_keep_alive=_KEEP_ALIVE_S,
            log_config=None,
            proxy_headers=False,
            access_log=False,
            ws="none",  # whatever is installed: no route takes a WebSocket
            lifespan="off",
            server_header=False,
            **({} if tls is None else tls.uvicorn_options()),
        )
        self._server = _UvicornServer(config, self._address)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nbllm-server", daemon=True)
        self._thread.start()
        self._server.ready.wait(30)
        if not self._server.started:
            raise NbllmError(f"the server did not start on {self.url}") from self._error
        over = "" if self.uds is None else f" over the Unix socket {self.uds}"
        self._app.log.lines.add(f"started on {self.base_url}{over}")
        self._card.follow(self._thread)

    def _run(self) -> None:
        lines = self._app.log.lines
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except BaseException as error:
            self._error = error
            if not self._server.started:
                self._address.release()
            logger.exception("the server failed")
            lines.add(f"failed: {describe(error)}")
        finally:
            self._socket.close()
            lines.add("stopped")
            self._server.ready.set()
