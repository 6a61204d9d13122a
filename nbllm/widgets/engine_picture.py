"""The dashboard as a picture and as text: what shows wherever a notebook is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_PAGE, _INK, _MUTED, _LINE = "#ffffff", "#1f2328", "#5f6670", "#d3d7dc"
_USED, _CACHED, _FREE = "#0b63c4", "#9cc3ec", "#f3f4f6"
_WIDTH, _MARGIN = 760, 14
_INNER = _WIDTH - 2 * _MARGIN
_ROW = 18
_MAX_ROWS = 12
_COLUMNS = (  # name, heading, right edge of numbers or left edge of text
    ("id", "request", 0),
    ("source", "from", 110),
    ("status", "state", 210),
    ("prompt", "prompt", 370),
    ("generated", "generated", 500),
    ("age", "age", 610),
    ("pages", "pages", _INNER),
)
_TEXTS = ("id", "source", "status")

State = Mapping[str, Any]


def engine_text(name: str, status: str, state: State) -> str:
    """The numbers, and a line for each of the first requests.

    Args:
        name: of the model.
        status: how it is.
        state: `Dashboard.state`; may be empty.
    """
    lines = [f"{name}: {status}"]
    if not state:
        return lines[0]
    lines += [f"{heading}: {value}{note}" for heading, value, note in _tiles(state)]
    lines += [_pages(state), _headline(state)]
    lines += [
        f"  {row['id']} {row['source']} {row['status']}, prompt {row['prompt']}, "
        f"generated {row['generated']}, {row['age']}, {row['pages']} pages"
        for row in state["requests"][:_MAX_ROWS]
    ]
    return "\n".join(lines)


def engine_svg(name: str, status: str, state: State) -> str | None:
    """An image of the same, with the tokens of the last minute as curves; None without a state."""
    if not state:
        return None
    shapes = [_text(0, 14, f"{name}: {status}", _INK, weight="bold")]
    tiles = _tiles(state)
    step = _INNER / len(tiles)
    for number, (heading, value, note) in enumerate(tiles):
        x = number * step
        shapes.append(_text(x, 42, heading, _MUTED))
        shapes.append(_text(x, 64, value, _INK, size=17))
        shapes.append(_text(x, 80, note.strip(" ()"), _MUTED, size=10))
    for tile, column in ((2, 2), (3, 1)):
        shapes.append(_curve(tile * step, 86, step - 20, 22, state, column))
    shapes += [_text(0, 132, _pages(state), _INK), _bar(140, state)]
    shapes.append(_text(0, 178, _headline(state), _INK))
    shapes += _table(196, state["requests"])
    rows = min(len(state["requests"]), _MAX_ROWS)
    height = 196 + 2 * _MARGIN + (rows + 1) * _ROW * bool(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{_WIDTH}" height="{height}" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><title>{escape(engine_text(name, status, state))}</title>'
        f'<rect x="{-_MARGIN}" y="{-_MARGIN}" width="{_WIDTH}" height="{height}" fill="{_PAGE}"/>'
        f"{''.join(shapes)}</svg>"
    )


def _tiles(state: State) -> list[tuple[str, str, str]]:
    """(heading, value, note), the same as in the view."""
    share, total = state["prefix_hit_share"], state["total_prefix_hit_share"]
    recent = state["num_recent_preemptions"]
    return [
        ("Running", f"{state['num_running']:,}", f" of {state['max_num_seqs']:,}"),
        ("Waiting", f"{state['num_waiting']:,}", ""),
        ("Generated", f"{state['generation_rate']:,.0f}", " tokens/s"),
        ("Prompts", f"{state['prompt_rate']:,.0f}", " tokens/s"),
        ("Prefix hits", _percent(share), "" if total is None else f" ({_percent(total)} in all)"),
        ("Preemptions", f"{state['num_preemptions']:,}", f" ({recent:,} in the last minute)"),
    ]


def _pages(state: State) -> str:
    used, cached = state["num_used_blocks"], state["num_cached_blocks"]
    free = state["num_blocks"] - used - cached
    return (
        f"KV cache: {used:,} used, {cached:,} cached, {free:,} free of {state['num_blocks']:,} "
        f"pages of {state['block_size']} tokens"
    )


def _headline(state: State) -> str:
    counts = [f"{count:,} {source}" for source, count in sorted(state["num_by_source"].items())]
    return f"Requests: {', '.join(counts)}" if counts else "No requests"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _bar(y: float, state: State) -> str:
    used = _INNER * state["num_used_blocks"] / state["num_blocks"]
    cached = _INNER * state["num_cached_blocks"] / state["num_blocks"]
    return (
        f'<rect x="0" y="{y}" width="{_INNER}" height="14" fill="{_FREE}" stroke="{_LINE}"/>'
        f'<rect x="{used:.1f}" y="{y}" width="{cached:.1f}" height="14" fill="{_CACHED}"/>'
        f'<rect x="0" y="{y}" width="{used:.1f}" height="14" fill="{_USED}"/>'
    )


def _curve(x: float, y: float, width: float, height: float, state: State, column: int) -> str:
    points: Sequence[Sequence[float]] = state["curve"]
    top = max((point[column] for point in points), default=0.0) or 1.0
    window = state["window_s"]
    places = [
        (x + width * max(1 - point[0] / window, 0), y + height * (1 - point[column] / top))
        for point in points
    ]
    path = " ".join(f"{right:.1f},{down:.1f}" for right, down in places)
    base = f'<path d="M{x:.1f} {y + height}h{width:.1f}" stroke="{_LINE}"/>'
    return f'{base}<polyline points="{path}" fill="none" stroke="{_USED}" stroke-width="1.5"/>'


def _table(y: float, rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    shapes = [_cell(name, x, y, heading, _MUTED) for name, heading, x in _COLUMNS]
    for number, row in enumerate(rows[:_MAX_ROWS], start=1):
        shapes += [_cell(name, x, y + number * _ROW, row[name], _INK) for name, _, x in _COLUMNS]
    return shapes


def _cell(name: str, x: float, y: float, text: str, ink: str) -> str:
    return _text(x, y, text, ink, anchor="start" if name in _TEXTS else "end")


def _text(
    x: float,
    y: float,
    text: str,
    ink: str,
    *,
    size: int = 12,
    anchor: str = "start",
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{ink}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
