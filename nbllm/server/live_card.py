"""LiveCard: what a cell shows of a server, kept up to date where it stands.

It is plain HTML that is replaced through its display id: it needs no script and no widget, works in
every frontend, and the saved notebook has the last state. The requests have an output of their own,
so that the snippets above them stay open while it changes.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

from nbllm.notebook_cell import show_replaceable

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5

Bundle = dict[str, str]
"""MIME type -> what is shown."""


class LiveCard:
    """Two outputs of a cell, or of several.

    Args:
        make_card: what the server is; shown anew when it starts and stops.
        make_requests: what it does; looked at twice a second while it runs, and shown if it has
            changed.
    """

    def __init__(
        self, make_card: Callable[[], Bundle], make_requests: Callable[[], Bundle]
    ) -> None:
        self._make_card = make_card
        self._make_requests = make_requests
        self._ids = uuid.uuid4().hex, uuid.uuid4().hex
        self._is_shown = False
        self._lock = threading.Lock()  # one follower at a time
        self._followed: threading.Thread | None = None
        self._follower: threading.Thread | None = None

    def show(self) -> None:
        """Show it in the cell that runs.

        Raises:
            NotImplementedError: as `show_replaceable`.
        """
        bundles = self._make_card(), self._make_requests()
        show_replaceable(dict(zip(self._ids, bundles, strict=True)))
        self._is_shown = True
        self._start()

    def follow(self, thread: threading.Thread) -> None:
        """The server runs in `thread`, from now on."""
        with self._lock:
            self._followed = thread
        if self._is_shown:
            self._update(0, self._make_card())
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._follower is None:
                self._follower = threading.Thread(
                    target=self._run, name="nbllm-server-card", daemon=True
                )
                self._follower.start()

    def _run(self) -> None:
        try:
            while True:
                followed = self._followed
                self._show_until_end(followed)
                with self._lock:
                    if self._followed is followed:  # else it was started again meanwhile
                        self._follower = None
                        return
        except Exception:  # nobody waits for a picture: the server goes on
            logger.exception("the server's card is shown no more")

    def _show_until_end(self, followed: threading.Thread | None) -> None:
        shown: Bundle = {}
        while followed is not None and followed.is_alive():
            bundle = self._make_requests()
            if bundle != shown:
                shown = bundle
                self._update(1, bundle)
            followed.join(_INTERVAL_S)
        self._update(0, self._make_card())
        self._update(1, self._make_requests())

    def _update(self, number: int, bundle: Bundle) -> None:
        from IPython.display import update_display

        data: Any = bundle
        update_display(data, raw=True, display_id=self._ids[number])
