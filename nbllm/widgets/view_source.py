"""The text of a view: its own file after those of the parts that it is made of.

A notebook keeps it in each copy of a widget, so comments, indentation and blank lines stay behind.
"""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = Path(__file__).parent
_COMMENT = re.compile(r"/\*.*?\*/|^\s*//[^\n]*$|\s// [^\n]*$", re.DOTALL | re.MULTILINE)


def view_source(*stems: str) -> str:
    """One ES module out of some `<stem>.js` of this folder.

    The parts share one scope: the last has `export default { render }`, those before define plain
    functions and export nothing. So a view needs no import, from the network least of all. None
    has a string of several lines, or comment marks in a string.
    """
    return "\n".join(_read(f"{stem}.js") for stem in stems)


def view_style(*stems: str) -> str:
    """`theme.css` and some `<stem>.css` of this folder as one style sheet."""
    return "\n".join(_read(f"{stem}.css") for stem in ("theme", *stems))


def slim(text: str) -> str:
    """A script or style sheet without comments, indentation and blank lines."""
    lines = (line.strip() for line in _COMMENT.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)


def _read(name: str) -> str:
    return slim((_FOLDER / name).read_text(encoding="utf-8"))
