"""How long a text the repetitions of a regex or a grammar make.

`(a{1000}){1000}` is short, and llguidance writes a million letters out the first time that it looks
at them, in seconds of native code that nothing can end. So they are counted beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

MAX_REPEATED = 100_000
"""Letters of a regex or terminal, its repetitions written out; takes a third of a second."""

_MAX_ROUNDS = 32  # of looking up the lengths of other terminals
_MOST = 10**12  # larger numbers are as good as this one
# An escape, a class of letters, a repetition, or a single letter.
_REGEX = re.compile(
    r"\\(?:[pPux]\{[^}]*\}|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d{1,10})\d*(?:,\d*)?\}|.", re.DOTALL
)
_LARK = re.compile(
    r'"(?P<text>(?:\\.|[^"\\\n])*)"i?|/(?P<regex>(?:\\.|[^/\\\n])+)/[imslux]*|//[^\n]*|'
    r"(?P<definition>^\s*[?!]?\w+\s*(?:\[[^\]\n]*\])?\s*:)|(?P<name>\w+)|"
    r"(?:\{|~\s*)(?P<times>\d{1,10})\d*(?:\s*(?:,|\.\.)\s*\d*)?\}?|(?P<other>[()])",
    re.MULTILINE,
)


def repeated_length(regex: str) -> int:
    """Letters of a regex, with each part as often as it occurs at least."""
    return _measure(_regex_parts(regex))


def longest_terminal(grammar: str) -> int:
    """The same of the longest terminal of a grammar in Lark's form."""
    bodies = _terminals(grammar)
    # Texts, too: a schema may be among the rules, and have patterns.
    inline = [part["regex"] or part["text"] for parts in bodies.values() for part in parts]
    lengths = dict.fromkeys(filter(str.isupper, bodies), 0)
    names = list(lengths)
    for _ in range(_MAX_ROUNDS):  # both ways, as they may be defined before they are used or after
        before = dict(lengths)
        for name in (*names, *reversed(names)):
            lengths[name] = _measure(_lark_parts(bodies[name], lengths))
        if lengths == before:
            break
    return max([*(repeated_length(text) for text in inline if text), *lengths.values()], default=0)


def _measure(parts: Iterable[tuple[str, int]]) -> int:
    """Add up parts: ("size", letters), ("times", number), or a bracket."""
    sizes = [0]
    last = 0
    for kind, number in parts:
        if kind == "size":
            last = number
            sizes[-1] += number
        elif kind == "times":
            sizes[-1] += last * (number - 1)
            last *= number
        elif kind == "(":
            sizes.append(0)
        elif len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        last, sizes[-1] = min(last, _MOST), min(sizes[-1], _MOST)
    return sum(sizes)


def _regex_parts(regex: str) -> Iterator[tuple[str, int]]:
    for part in _REGEX.finditer(regex):
        text = part[0]
        if text in ("(", ")"):
            yield text, 0
        elif part[1] is not None:
            yield "times", max(int(part[1]), 1)
        elif text not in ("|", "*", "+", "?"):
            yield "size", 1


def _lark_parts(
    parts: Iterable[re.Match[str]], lengths: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    for part in parts:
        if part["text"] is not None:
            yield "size", len(part["text"])
        elif part["regex"] is not None:
            yield "size", repeated_length(part["regex"])
        elif part["name"] is not None:
            yield "size", lengths.get(part["name"], 0)  # of a rule: none of its own
        elif part["times"] is not None:
            yield "times", max(int(part["times"]), 1)
        elif part["other"] is not None:
            yield part["other"], 0


def _terminals(grammar: str) -> dict[str, list[re.Match[str]]]:
    """Name -> the parts of its definition."""
    bodies: dict[str, list[re.Match[str]]] = {}
    current: list[re.Match[str]] = []
    for part in _LARK.finditer(grammar):
        if part["definition"] is not None:
            current = bodies.setdefault(re.findall(r"\w+", part[0])[0], [])
        else:
            current.append(part)
    return bodies
