"""The lanes of a playground where no script runs: as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from nbllm.widgets.branch_tree import Token
from nbllm.widgets.lane import Lane
from nbllm.widgets.token_map import token_map_svg


def lanes_text(prompt: str, lanes: Sequence[Lane]) -> str:
    """The prompt and the texts, with their titles if there are several."""
    lines = [prompt]
    for lane in lanes:
        heading = f"[{lane.title}] " if len(lanes) > 1 else ""
        problem = f" ({lane.error})" if lane.error is not None else ""
        lines.append(f"{heading}{lane.text}{problem}")
    return "\n".join(lines)


def lanes_svg(prompt: str, lanes: Sequence[Lane]) -> str | None:
    """The texts with the probability of each token; None if there are none."""
    if not any(lane.tokens for lane in lanes):
        return None
    parts: list[tuple[str, list[Token]]] = [(prompt, [])]
    parts += [(lane.title, lane.tokens) for lane in lanes]
    return token_map_svg(f"Token probabilities. {lanes_text(prompt, lanes)}", parts)
