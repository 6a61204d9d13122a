"""Dashboard: what the engine does right now, and for whom.

nbllm.Dashboard(llm)       # in a cell, above or below those that use the model
"""

from __future__ import annotations

import time
import weakref
from typing import Any

import traitlets

from nbllm.checks import check_float, fail
from nbllm.default_llm import default_llm
from nbllm.errors import EngineClosedError
from nbllm.llm import LLM
from nbllm.outputs import EngineSnapshot, RequestSnapshot
from nbllm.widgets.engine_history import WINDOW_S, EngineHistory
from nbllm.widgets.engine_picture import engine_svg, engine_text
from nbllm.widgets.frozen import Frozen
from nbllm.widgets.poller import Poller
from nbllm.widgets.view_source import view_source, view_style

_MAX_REQUESTS = 50  # rows of the table
_MIN_INTERVAL_S = 0.05
_TIMEOUT_S = 1.0  # after which an engine that does not answer counts as busy


class Dashboard(Frozen):
    """Pages of the KV cache, batch, queue, tokens per second, prefix hits, preemptions, requests.

    The requests of cells, DataFrames, HTTP clients and widgets are in one table, as they are in one
    batch. The engine is looked at while a view is open, also while a cell runs. It may be closed,
    or have no other user left, at any time: the dashboard keeps no model in memory.

    Args:
        llm: default: what accessors use, see `nbllm.set_default_llm`.
        interval_s: seconds between two looks.

    Attributes:
        state: what was seen last; see `_state_of`.
        status: "live", "busy" (a step takes its time), "closed" or "failed".
        error: why nothing is seen any more, or "".
        is_paused: nobody looks; may be set.

    Raises:
        InvalidRequestError: an argument is wrong.
    """

    _esm = view_source("dashboard_parts", "dashboard")
    _css = view_style("dashboard")

    state = traitlets.Dict().tag(sync=True)
    status = traitlets.Unicode("live").tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    is_paused = traitlets.Bool(False).tag(sync=True)
    model_name = traitlets.Unicode().tag(sync=True)

    def __init__(self, llm: LLM | None = None, *, interval_s: float = 0.5) -> None:
        if llm is not None and not isinstance(llm, LLM):
            fail("llm", f"must be an LLM, got {type(llm).__name__}")
        llm = default_llm() if llm is None else llm
        check_float("interval_s", interval_s, minimum=_MIN_INTERVAL_S)
        self._llm = weakref.ref(llm)
        self._history = EngineHistory()
        self._views: set[str] = set()
        self._poller = Poller(self._look, interval_s)
        super().__init__(model_name=f"{llm.model_name}, {llm.config.device}, {llm.config.dtype}")
        self._look()
        self.on_msg(self._on_message)
        self.observe(self._on_paused, names="is_paused")

    # -- from code ----------------------------------------------------------------------------

    def stop(self) -> None:
        """Look no more, whoever watches, until `start`. Returns at once."""
        self.is_paused = True

    def start(self) -> None:
        """Look again after `stop`; or from now on, if no view is open."""
        self.is_paused = False
        self._poller.start()

    @property
    def is_looking(self) -> bool:
        """True while the engine is looked at."""
        return self._poller.is_running

    def freeze(self) -> None:
        """Look once more, and replace the view by a picture of it, see `Frozen.freeze`."""
        if not self.is_frozen:
            self.stop()
            self._look()
        super().freeze()

    # -- static forms -------------------------------------------------------------------------

    def static_text(self) -> str:
        """The numbers, and a line for each request."""
        return engine_text(self.model_name, self._status_text(), self.state)

    def static_svg(self) -> str | None:
        """The numbers, the pages as a bar, the tokens of the last minute, and the requests."""
        return engine_svg(self.model_name, self._status_text(), self.state)

    def _status_text(self) -> str:
        return f"{self.status}: {self.error}" if self.error else self.status

    # -- showing ------------------------------------------------------------------------------

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        self._watch()
        return super()._repr_mimebundle_(**options)

    def _ipython_display_(self, **options: Any) -> None:
        self._watch()
        super()._ipython_display_(**options)

    def _watch(self) -> None:
        # Not only when the view says so: its message waits until the cell that shows it has ended.
        if not self.is_paused and not self.is_frozen:
            self._poller.start()

    def _on_message(self, _: Any, content: Any, __: Any) -> None:
        kind, view = content.get("type"), str(content.get("view"))
        if kind == "open":
            self._views.add(view)
            self._watch()
        elif kind == "close":
            self._views.discard(view)
            if not self._views:
                self._poller.stop()
        else:
            self.error = f"there is no message {kind!r}"

    def _on_paused(self, change: Any) -> None:
        if change["new"]:
            self._poller.stop()
        elif self._views:
            self._poller.start()

    # -- in the poller's thread ---------------------------------------------------------------

    def _look(self) -> bool:
        """Take what the engine shows; False once there is nothing to be seen any more."""
        llm = self._llm()
        try:
            if llm is None:
                raise EngineClosedError("the LLM is gone: nothing refers to it any more")
            snapshot = llm.snapshot(_MAX_REQUESTS, timeout_s=_TIMEOUT_S)
        except TimeoutError:
            self.status = "busy"
            return True
        except Exception as error:  # whatever it is, the user sees it
            self.status = "closed" if isinstance(error, EngineClosedError) else "failed"
            self.error = str(error) or type(error).__name__
            return False
        self._history.add(snapshot, time.monotonic())
        self.state = _state_of(snapshot, self._history, llm)
        self.status, self.error = "live", ""
        return True


def _state_of(snapshot: EngineSnapshot, history: EngineHistory, llm: LLM) -> dict[str, Any]:
    """What the view shows, as JSON. Rates are tokens per second, shares 0 to 1 or None."""
    metrics, rates = snapshot.metrics, history.rates
    queries = metrics["prefix_cache_queries"]
    return {
        "num_running": metrics["num_requests_running"],
        "max_num_seqs": llm.config.max_num_seqs,
        "num_waiting": metrics["num_requests_waiting"],
        "block_size": snapshot.block_size,
        "num_blocks": snapshot.num_blocks,
        "num_used_blocks": snapshot.num_used_blocks,
        "num_cached_blocks": snapshot.num_cached_blocks,
        "prompt_rate": rates.prompt,
        "generation_rate": rates.generation,
        "window_s": WINDOW_S,
        "curve": [
            [round(ago, 2), round(rate.prompt, 1), round(rate.generation, 1)]
            for ago, rate in history.curve()
        ],
        "prefix_hit_share": history.prefix_hit_share,
        "total_prefix_hit_share": metrics["prefix_cache_hits"] / queries if queries else None,
        "num_preemptions": metrics["num_preemptions"],
        "num_recent_preemptions": history.num_preemptions,
        "num_by_source": snapshot.num_by_source,
        "requests": [_row_of(request) for request in snapshot.requests],
    }


def _row_of(request: RequestSnapshot) -> dict[str, Any]:
    limit = request.max_tokens
    generated = f"{request.num_output_tokens:,} / {limit:,}" if limit else "embedding"
    return {
        "id": request.request_id,
        "source": request.source,
        "status": request.status,
        "prompt": f"{request.num_prompt_tokens:,}",
        "generated": generated,
        "age": _seconds(request.age_s),
        "pages": f"{request.num_blocks:,}",
    }


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
