"""PlaygroundCommands: what can be asked of a playground, from code or by a view."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from nbllm.errors import InvalidRequestError
from nbllm.widgets.branch_tree import Token
from nbllm.widgets.lane import Job
from nbllm.widgets.lane_runner import LaneRunner
from nbllm.widgets.playground_inputs import PlaygroundInputs


class PlaygroundCommands:
    """All methods but `jobs` are called in the thread of the background loop.

    Args:
        runner: does it.
        inputs: what is shown to be run, with a seed for lanes whose parameters have none.
    """

    def __init__(self, runner: LaneRunner, inputs: Callable[[int], PlaygroundInputs]) -> None:
        self._runner = runner
        self._inputs = inputs
        self._seed = _draw_seed()

    def jobs(self) -> dict[int, Job]:
        """What `run` does, with a new seed; raises as `PlaygroundInputs.jobs`. In any thread."""
        self._seed = _draw_seed()
        return self._inputs(self._seed).jobs(self._runner.lanes)

    def run(self) -> None:
        """Generate in all lanes."""
        self._runner.start(self.jobs())

    def run_live(self) -> None:
        """The same for a slider that moves, with the seed as it was: only what it does changes."""
        jobs = self._inputs(self._seed).jobs(self._runner.lanes, is_live=True)
        self._runner.start_live(jobs)

    def branch(self, lane: int, index: int, token_id: int | None) -> None:
        """Go on from a token of a lane, see `Playground.branch`."""
        number = self._lane(lane)
        kept = self._runner.lanes[number].with_token(index, token_id)
        self._seed = _draw_seed()  # else the same token would have the same text after it
        self._continue(number, kept)

    def edit(self, lane: int, text: str) -> None:
        """Go on from an edited text, see `Playground.edit`."""
        number = self._lane(lane)
        self._continue(number, self._runner.lanes[number].edited(text))

    def select(self, lane: int, node: int) -> None:
        """Show another branch, see `Playground.select`."""
        self._runner.select(self._lane(lane), node)

    def do(self, content: Mapping[str, Any]) -> None:
        """What a view asks for: `{"type": "run" | "stop" | "branch" | "edit" | "select", ...}`.

        Raises:
            InvalidRequestError: it can't be done, or is not understood.
        """
        kind, lane = content.get("type"), content.get("lane", 0)
        try:
            if kind == "run":
                self.run()
            elif kind == "stop":
                self._runner.cancel()
            elif kind == "branch":
                self.branch(lane, content["index"], content["token_id"])
            elif kind == "edit":
                self.edit(lane, content["text"])
            elif kind == "select":
                self.select(lane, content["node"])
            else:
                raise InvalidRequestError(f"there is no message {kind!r}", parameter="type")
        except KeyError as error:
            raise InvalidRequestError(f"the message lacks {error}", parameter="type") from error

    def _continue(self, number: int, kept: list[Token]) -> None:
        job = self._inputs(self._seed).continued(self._runner.lanes[number], kept)
        self._runner.start({number: job})

    def _lane(self, lane: Any) -> int:
        if not isinstance(lane, int) or not 0 <= lane < len(self._runner.lanes):
            raise InvalidRequestError(f"there is no lane {lane!r}", parameter="lane")
        return lane


def _draw_seed() -> int:
    return random.SystemRandom().getrandbits(31)
