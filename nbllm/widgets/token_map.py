"""The heat-map of tokens as a picture: SVG that shows wherever a notebook is looked at."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape
from math import exp
from textwrap import wrap

from nbllm.widgets.branch_tree import Token

COLORS: list[tuple[float, str, str]] = [
    (0.9, "", ""),
    (0.7, "#fcf1b5", "#1f2328"),
    (0.5, "#fbd75e", "#1f2328"),
    (0.3, "#f9a83c", "#1f2328"),
    (0.1, "#e8704f", "#1f2328"),
    (0.03, "#bc3754", "#ffffff"),
    (0.0, "#6b176e", "#ffffff"),
]
"""(least probability, background, text), from sure to surprising; "" is the page's own.

The steps of matplotlib's inferno: each is darker than the one before, for every kind of eye.
"""

_WIDTH = 92  # characters in a line
_CHAR, _LINE, _MARGIN = 7.8, 22, 12  # pixels; a character of 13 pixels is 7.8 wide
_PAGE, _INK, _MUTED = "#ffffff", "#1f2328", "#5f6670"


def visible_text(token: Token) -> str:
    """The text of a token with something to see for what has no form of its own."""
    if not token.text:
        return "⋯"
    text = token.text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return "␣" * len(text) if text.isspace() and len(text) > 1 else text


def token_map_svg(title: str, parts: Sequence[tuple[str, Sequence[Token]]]) -> str:
    """An image of some texts, each token on the colour of its probability.

    Args:
        title: what it shows, for who can't see it.
        parts: a heading ("" for none) and the tokens of each text.
    """
    shapes: list[str] = []
    row = 0
    for heading, tokens in parts:
        for line in [part for text in heading.splitlines() for part in wrap(text, _WIDTH)]:
            shapes.append(_label(_MARGIN, row, line, _MUTED))
            row += 1
        column = 0
        for token in tokens:
            text = visible_text(token)
            width = _columns(text)
            if column and column + width > _WIDTH:
                row, column = row + 1, 0
            shapes.append(_cell(token, text, row, column, width))
            column += width
            if token.text.endswith("\n"):
                row, column = row + 1, 0
        row += bool(column)
    shapes.append(_legend(row))
    width_px, height_px = round(_WIDTH * _CHAR + 2 * _MARGIN), (row + 1) * _LINE + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width_px}" '
        f'height="{height_px}" viewBox="0 0 {width_px} {height_px}" font-family="monospace" '
        f'font-size="13"><title>{escape(title)}</title>'
        f'<rect width="{width_px}" height="{height_px}" fill="{_PAGE}"/>{"".join(shapes)}</svg>'
    )


def color_of(logprob: float | None) -> tuple[str, str]:
    """Background and text of a token; "" is the page's own."""
    if logprob is not None:
        for least, background, ink in COLORS:
            if exp(logprob) >= least:
                return background, ink
    return "", ""


def _cell(token: Token, text: str, row: int, column: int, width: int) -> str:
    background, ink = color_of(token.logprob)
    x, y = _MARGIN + column * _CHAR, _MARGIN + row * _LINE
    box = f'x="{x:.1f}" y="{y}" width="{width * _CHAR:.1f}" height="{_LINE - 4}"'
    shape = f'<rect {box} fill="{background}"/>' if background else ""
    if token.is_special:
        ink = ink or _MUTED
        shape += f'<rect {box} fill="none" stroke="{_MUTED}" stroke-dasharray="2 2"/>'
    if text.strip():
        shape += _label(x, row, text, ink or _INK, width)
    return shape


def _label(x: float, row: int, text: str, ink: str, columns: int | None = None) -> str:
    # The size is fixed, whatever font stands in for the one that was meant.
    text = "".join(" " if ord(char) < 32 else char for char in text)  # XML has no such characters
    fixed = "" if columns is None else f' textLength="{columns * _CHAR:.1f}" lengthAdjust="spacing"'
    return (
        f'<text x="{x:.1f}" y="{_MARGIN + row * _LINE + 13}" fill="{ink}"{fixed} '
        f'xml:space="preserve">{escape(text)}</text>'
    )


def _legend(row: int) -> str:
    shapes, x = [_label(_MARGIN, row, "probability", _MUTED)], _MARGIN + 13 * _CHAR
    for least, background, ink in COLORS:
        text = f"≥{least:.0%}" if least else f"<{COLORS[-2][0]:.0%}"
        box = f'x="{x:.1f}" y="{_MARGIN + row * _LINE}" width="42" height="{_LINE - 4}"'
        shapes.append(f'<rect {box} fill="{background or _PAGE}" stroke="#d3d7dc"/>')
        shapes.append(_label(x + 6, row, text, ink or _INK))
        x += 48
    return "".join(shapes)


def _columns(text: str) -> int:
    """Width in a fixed-width font."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )
