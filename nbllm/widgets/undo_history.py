"""UndoHistory: the states that a widget went through."""

from __future__ import annotations

from typing import Any

_MAX_STATES = 200


class UndoHistory:
    """A line of states, and a place in it.

    Args:
        state: the first one, which stays.
    """

    def __init__(self, state: Any) -> None:
        self._states = [state]
        self._position = 0
        self._last_gesture: int | None = None

    @property
    def can_undo(self) -> bool:
        """True if there is a state before this one."""
        return self._position > 0

    @property
    def can_redo(self) -> bool:
        """True if there is a state after this one."""
        return self._position < len(self._states) - 1

    def remember(self, state: Any, gesture: int | None = None) -> None:
        """Add a state after this one; those that were undone are gone.

        Args:
            state: nothing happens if it is this one.
            gesture: states of one gesture in a row are one step, a slider's way from press to
                release; None is a step of its own.
        """
        if self._states[self._position] == state:
            return
        is_same = gesture is not None and gesture == self._last_gesture and self.can_undo
        self._last_gesture = gesture
        kept = self._states[: self._position + (0 if is_same else 1)]
        self._states = [*kept, state][-_MAX_STATES:]
        self._position = len(self._states) - 1

    def move(self, step: int) -> Any:
        """The state so many steps away, -1 is the one before; this one if there is none."""
        if 0 <= self._position + step < len(self._states):
            self._last_gesture = None
            self._position += step
        return self._states[self._position]
