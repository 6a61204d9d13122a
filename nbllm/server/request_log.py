"""The recent requests of a server, and how many there were."""

from __future__ import annotations

import time
from collections import deque
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from nbllm.server.log_lines import LogLines, describe

if TYPE_CHECKING:
    import pandas as pd

MAX_RECORDS = 1000


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request.

    Attributes:
        id: of the reply, or "" if there was none.
        route: the path, without the query.
        status: HTTP's; 0 while there is none.
        started: seconds since the epoch.
        seconds: from the request to the end of the reply, or None while it runs.
        prompt_tokens, completion_tokens: so far.
        error: what went wrong, or "".
    """

    route: str
    id: str = ""
    status: int = 0
    started: float = field(default_factory=time.time)
    seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Note the tokens so far."""
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens

    def line(self) -> str:
        """For the server's log."""
        tokens = f"{self.prompt_tokens}+{self.completion_tokens} tokens"
        error = f" {self.error}" if self.error else ""
        seconds = self.seconds or 0.0
        return f"{self.id or '-'} {self.route} {self.status} {seconds:.3f} s {tokens}{error}"


# The request that this task answers.
_current: ContextVar[RequestRecord | None] = ContextVar("nbllm_request", default=None)


def note_error(error: BaseException) -> None:
    """Note why the request that this task answers fails; the first reason stays."""
    record = _current.get()
    if record is not None and not record.error:
        record.error = describe(error)


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Sums over all requests of a server that ended, and what runs now.

    Attributes:
        num_requests: that ended.
        num_failed: of those, the ones with a status of 400 or more.
        num_running: now.
        prompt_tokens, completion_tokens: of the requests that ended.
    """

    num_requests: int = 0
    num_failed: int = 0
    num_running: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class RequestLog:
    """Keeps the last requests. The server's thread writes, any thread may read.

    Args:
        max_records: how many are kept.

    Attributes:
        lines: the server's log, with a line for each request that ended.
    """

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self.lines = LogLines()
        self._records: deque[RequestRecord] = deque(maxlen=max_records)
        self._stats = ServerStats()
        self._num_running = 0

    @property
    def num_running(self) -> int:
        """Requests that were begun and have not ended."""
        return self._num_running

    @property
    def stats(self) -> ServerStats:
        """Sums of all requests, also of those that are not kept any more."""
        ended = self._stats
        return ServerStats(
            ended.num_requests,
            ended.num_failed,
            self._num_running,
            ended.prompt_tokens,
            ended.completion_tokens,
        )

    def begin(self, route: str) -> RequestRecord:
        """A new request, which the task that calls this answers."""
        record = RequestRecord(route)
        _current.set(record)
        self._num_running += 1
        self._records.append(record)
        return record

    def end(self, record: RequestRecord) -> None:
        """The request's reply is complete, or nobody waits for it any more."""
        record.seconds = time.time() - record.started
        self._num_running -= 1
        ended = self._stats
        self._stats = ServerStats(
            ended.num_requests + 1,
            ended.num_failed + (record.status >= 400),
            0,
            ended.prompt_tokens + record.prompt_tokens,
            ended.completion_tokens + record.completion_tokens,
        )
        self.lines.add(record.line())

    def recent(self, n: int) -> list[RequestRecord]:
        """The last `n` requests, the newest first."""
        return list(self._records)[: -n - 1 : -1]

    def frame(self) -> pd.DataFrame:
        """The recent requests, the oldest first: one row each, the fields of `RequestRecord`."""
        import pandas as pd

        columns = ["id", "route", "status", "started", "seconds"]
        columns += ["prompt_tokens", "completion_tokens"]
        rows = [asdict(record) for record in list(self._records)]
        frame = pd.DataFrame(rows, columns=columns)
        frame["started"] = pd.to_datetime(frame["started"], unit="s", utc=True)
        return frame
