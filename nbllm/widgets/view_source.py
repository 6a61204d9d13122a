"""The text of a view: its own file after those of the parts that it is made of."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def view_source(*stems: str) -> str:
    """One ES module out of some `<stem>.js` of this folder.

    The parts share one scope: the last has `export default { render }`, those before define plain
    functions and export nothing. So a view needs no import, from the network least of all.
    """
    return "\n".join(_read(f"{stem}.js") for stem in stems)


def view_style(*stems: str) -> str:
    """`theme.css` and some `<stem>.css` of this folder as one style sheet."""
    return "\n".join(_read(f"{stem}.css") for stem in ("theme", *stems))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
