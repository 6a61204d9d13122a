"""What a view does not need when it runs, and a notebook need not keep in each copy of a widget."""

from __future__ import annotations

import re

_COMMENT = re.compile(r"/\*.*?\*/|^\s*//.*?$|\s// [^\"'`\n]*$", re.DOTALL | re.MULTILINE)


def slim_source(text: str) -> str:
    """A script or style sheet without comments, indentation and blank lines.

    For texts without strings of several lines, and without comment marks in strings.
    """
    lines = (line.strip() for line in _COMMENT.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)
