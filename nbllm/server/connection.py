"""Connection: HTTP/1.1 as uvicorn speaks it, with bounds on how long a client may do nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 120.0


class Connection(H11Protocol):
    """Closes if a client does not come to its request's body in time, or stops reading the reply.

    What a reader leaves unread fills the socket, and then a small buffer; after that its request
    waits for it. Who reads slowly may take as long as it likes.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """A piece of a request has come."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """The buffer is full: the client does not read."""
        super().pause_writing()
        self._stall_timer = self._after(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read what was in the buffer."""
        _cancel(self._stall_timer)
        self._stall_timer = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        _cancel(self._head_timer)
        self._head_timer = None
        _cancel(self._stall_timer)
        self._stall_timer = None
        super().connection_lost(exc)

    @property
    def _has_no_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        if not self._has_no_request:
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self._after(HEAD_TIMEOUT_S, self._give_up)

    def _after(self, seconds: float, function: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, function)

    def _give_up(self) -> None:
        self._head_timer = None
        if self._has_no_request and not self.transport.is_closing():
            self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
