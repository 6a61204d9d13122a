"""LaneRunner: the lanes of a playground run at once, in one batch, and what they say is reported.

A view gets small messages, each with the number that follows the one before. One that has missed
some, or was opened late, asks for the state, which holds everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nbllm.widgets.background_loop import background_loop, in_background, wait_for
from nbllm.widgets.branch_tree import Token
from nbllm.widgets.lane import Job, Lane
from nbllm.widgets.token_diff import first_difference, first_different_token, logprob_gap

_MIN_INTERVAL_S = 0.05  # between two messages, but for the first tokens of a lane
_LIVE_INTERVAL_S = 0.03  # between two starts that a slider asks for
_HOLD_S = 0.05  # after a slider's start, in which its first tokens may come before the state
_BRANCHES_SHOWN = 100


class LaneRunner:
    """All methods but `stop` and `wait` are called in the thread of the background loop.

    Args:
        lanes: side by side.
        send: gets each message: `{"type": "tokens", "seq": n, "lanes": [...]}`, with a dict for
            each lane that has news: lane (index), start (index of the first new token), tokens,
            stats, and diverges as in the state.
        publish: gets the state whenever something but tokens has changed: `{"seq": n, "running":
            bool, "lanes": [...]}`. A view that has all messages before `seq` has the tokens.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        send: Callable[[dict[str, Any]], None],
        publish: Callable[[dict[str, Any]], None],
    ) -> None:
        self.lanes = list(lanes)
        self._send = send
        self._publish = publish
        self._seq = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, their requests not yet aborted
        self._silent: set[int] = set()  # lanes whose first token is still to come
        self._num_sent = [0] * len(self.lanes)
        self._flush_timer: asyncio.TimerHandle | None = None
        self._last_flush = 0.0
        self._held: asyncio.TimerHandle | None = None  # tells of a start that is not yet told
        self._pending: Mapping[int, Job] | None = None  # live jobs that wait for their turn
        self._last_live = 0.0
        self._waiting: list[Callable[[], None]] = []

    @property
    def is_running(self) -> bool:
        """True while a lane generates, or is about to."""
        return bool(self._tasks) or self._pending is not None

    def start(self, jobs: Mapping[int, Job], *, hold: bool = False) -> None:
        """Run a job in each of some lanes; what ran in them ends.

        Args:
            jobs: by index of the lane.
            hold: publish the state later, the first tokens before it if they come soon: they take
                the place of those that are shown, and the state takes long to get to a view.
        """
        self._pending = None
        self._cancel(jobs)
        for index, job in jobs.items():
            self.lanes[index].begin(job)
            self._silent.add(index)
            self._num_sent[index] = 0
            self._tasks[index] = background_loop().create_task(self._run(index, job))
        if hold and self._held is None:
            self._held = background_loop().call_later(_HOLD_S, self._tell_held)
        elif not hold:
            self.publish(anew=True)

    def start_live(self, jobs: Mapping[int, Job]) -> None:
        """The same, for a slider that moves on and on: only the last of many jobs is run."""
        if self._pending is None:
            loop = background_loop()
            due = self._last_live + _LIVE_INTERVAL_S
            if loop.time() >= due:
                self._last_live = loop.time()
                self.start(jobs, hold=True)
                return
            loop.call_at(due, self._start_pending)
        self._pending = jobs

    def select(self, index: int, node: int) -> None:
        """Show another branch of a lane; what ran in it ends."""
        self._cancel([index])
        self.lanes[index].select(node)
        self.publish(anew=True)

    def cancel(self) -> None:
        """End what runs; what was said so far stays."""
        self._pending = None
        self._cancel(list(self._tasks))
        self.publish()

    def stop(self) -> None:
        """`cancel` from any thread; the pages are free when it returns."""
        in_background(self.cancel)
        self.wait(None)

    def wait(self, timeout_s: float | None) -> bool:
        """Wait in any other thread until nothing runs; False after `timeout_s` seconds."""
        return wait_for(self._tell_end, timeout_s)

    def publish(self, *, anew: bool = False) -> None:
        """Tell the state.

        Args:
            anew: the tokens are not only those of the messages so far.
        """
        if self._held is not None:
            self._held.cancel()
            self._held, anew = None, True
        if not anew:
            self._flush()
        self._seq += 1
        self._num_sent = [len(lane.tokens) for lane in self.lanes]
        lanes = []
        for lane, diverges in zip(self.lanes, self._divergences(), strict=True):
            lanes.append(
                {
                    "title": lane.title,
                    "status": lane.status,
                    "error": "" if lane.error is None else str(lane.error),
                    "tokens": [token_payload(token) for token in lane.tokens],
                    "stats": dict(lane.stats),
                    "branches": [
                        [*branch._replace(text=_short(branch.text)), branch.node == lane.tip]
                        for branch in lane.tree.branches()[:_BRANCHES_SHOWN]
                    ],
                    "diverges": diverges,
                }
            )
        state = {"seq": self._seq, "anew": anew, "running": self.is_running, "lanes": lanes}
        self._publish(state)

    def _tell_held(self) -> None:
        self.publish(anew=True)

    async def _run(self, index: int, job: Job) -> None:
        lane = self.lanes[index]
        try:
            await lane.run(job, lambda: self._on_tokens(index))
        except asyncio.CancelledError:
            raise  # whoever did it has said so
        except Exception as error:  # whatever it is, the user sees it
            lane.finish("error", error)
        else:
            lane.finish("done")
        del self._tasks[index]
        self.publish()
        self._tell_waiting()

    def _cancel(self, indexes: Sequence[int] | Mapping[int, Job]) -> None:
        for index in indexes:
            task = self._tasks.pop(index, None)
            if task is not None:
                self._ending.add(task)
                task.add_done_callback(self._on_end)
                task.cancel()
                self.lanes[index].finish("stopped")

    def _start_pending(self) -> None:
        if self._pending is not None:
            self._last_live = background_loop().time()
            self.start(self._pending, hold=True)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        self._tell_waiting()

    def _tell_end(self, told: Callable[[], None]) -> None:
        self._waiting.append(told)
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        if not self.is_running and not self._ending:
            while self._waiting:
                self._waiting.pop()()

    def _on_tokens(self, index: int) -> None:
        if index in self._silent:
            self._silent.discard(index)
            self._flush()
        elif self._flush_timer is None:
            due = max(self._last_flush + _MIN_INTERVAL_S, background_loop().time())
            self._flush_timer = background_loop().call_at(due, self._flush)

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        self._last_flush = background_loop().time()
        news = []
        for index, diverges in enumerate(self._divergences()):
            lane, start = self.lanes[index], self._num_sent[index]
            if len(lane.tokens) > start:
                tokens = [token_payload(token) for token in lane.tokens[start:]]
                news.append(
                    {
                        "lane": index,
                        "start": start,
                        "tokens": tokens,
                        "stats": dict(lane.stats),
                        "diverges": diverges,
                    }
                )
                self._num_sent[index] = len(lane.tokens)
        if news:
            self._seq += 1
            self._send({"type": "tokens", "seq": self._seq, "lanes": news})

    def _divergences(self) -> list[dict[str, Any] | None]:
        """For each lane where it parts from the first one: index, and the gap there in nats."""
        return [None, *(_divergence(self.lanes[0], lane) for lane in self.lanes[1:])]


def _divergence(first: Lane, other: Lane) -> dict[str, Any] | None:
    if first.llm is not other.llm:
        index = first_different_token(first.tokens, other.tokens)
        return None if index is None else {"index": index, "gap": None}
    ids = [[token.token_id for token in lane.tokens] for lane in (first, other)]
    index = first_difference(*ids)
    if index is None:
        return None
    return {"index": index, "gap": logprob_gap(first.tokens[index], ids[1][index])}


def token_payload(token: Token) -> list[Any]:
    """A token for a view: text, log-probability or null, id, whether special, alternatives."""
    alternatives = [
        [alternative.text, round(alternative.logprob, 4), alternative.token_id]
        for alternative in token.alternatives
    ]
    logprob = None if token.logprob is None else round(token.logprob, 4)
    return [token.text, logprob, token.token_id, token.is_special, alternatives]


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
