"""Frozen: what a widget leaves in a saved notebook, where no kernel and no script runs.

GitHub shows no widgets, and JupyterLab loses their state when a notebook is opened again. So each
output of a widget holds static forms next to the live one, and `freeze()` leaves only them.
"""

from __future__ import annotations

import uuid
from typing import Any

import anywidget

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class Frozen(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget's base has no types
    """An anywidget with static forms; a subclass has `static_text` and perhaps the other two.

    A cell shows it under a display id, as its last expression as well as through `display`, so that
    `freeze` and `refresh` reach each output where it is, in whatever cell.
    """

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self._display_id = uuid.uuid4().hex
        self._is_frozen = False

    def static_text(self) -> str:
        """What it shows, as plain text."""
        raise NotImplementedError

    def static_svg(self) -> str | None:
        """What it shows, as a picture: hand-written SVG, colours as attributes; None for none."""
        return None

    def static_html(self) -> str | None:
        """What it shows, as HTML without styles and scripts, for tables; None for none."""
        return None

    @property
    def is_frozen(self) -> bool:
        """True once `freeze` was called."""
        return self._is_frozen

    def freeze(self) -> None:
        """Replace each live output by what it shows now, for good; later displays are static, too.

        Its state is saved no more with the notebook. Idempotent, and may be called from any thread.
        """
        if self._is_frozen:
            return
        self._is_frozen = True
        self.refresh()
        self.layout.close()
        self.close()
        # `close` shadows the method by None, after which nothing at all would be shown.
        self.__dict__.pop("_repr_mimebundle_", None)

    def refresh(self) -> None:
        """Bring the static forms of each output up to date; the live view goes on where it was.

        For the end of what a widget does, so that a notebook saved then shows the result. The
        views are made anew, so not while somebody turns a knob.
        """
        from IPython.core.getipython import get_ipython
        from IPython.display import update_display

        if get_ipython() is not None:
            update_display(self._bundle(), raw=True, display_id=self._display_id)

    def _bundle(self) -> dict[str, Any]:
        forms = {
            "text/plain": self.static_text(),
            "text/html": self.static_html(),
            "image/svg+xml": self.static_svg(),
        }
        bundle: dict[str, Any] = {kind: form for kind, form in forms.items() if form is not None}
        if not self._is_frozen:
            live = super()._repr_mimebundle_()
            data = live[0] if isinstance(live, tuple) else live
            bundle[_WIDGET_VIEW] = data[_WIDGET_VIEW]
        return bundle

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return self._bundle()

    def _ipython_display_(self, **_: Any) -> None:
        # IPython gives the last expression of a cell no display id: this asks for one.
        from IPython.display import display

        display(self._bundle(), raw=True, display_id=self._display_id)
