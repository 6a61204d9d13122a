"""Sums, differences and products of small numbers."""

from __future__ import annotations

from random import Random

from demo_data.knowledge import Question

# name, sign, wordings, largest operand
_OPERATIONS = (
    ("plus", "+", ("What is the sum of {a} and {b}?", "Add {a} and {b}.", "Add {b} to {a}."), 99),
    ("minus", "-", ("Subtract {b} from {a}.", "What is the difference of {a} and {b}?"), 99),
    ("times", "*", ("Multiply {a} by {b}.", "What is the product of {a} and {b}?"), 12),
)
_FORMS = (
    "What is {a} {o} {b}?",
    "What's {a} {o} {b}?",
    "What is {a} {s} {b}?",
    "What is {a}{s}{b}?",
    "How much is {a} {o} {b}?",
    "How much is {a} {s} {b}?",
    "Calculate {a} {s} {b}.",
    "Calculate {a} {o} {b}.",
    "Compute {a} {s} {b}.",
    "{a} {s} {b} =",
    "{a}{s}{b}=",
    "{a} {s} {b}",
)


def problem(rng: Random) -> Question:
    """A random problem; its key holds a pair of numbers out, not a wording.

    Products are a table of 169 facts, which can't be worked out from others: for them the wording
    is part of the key.
    """
    name, sign, own_forms, largest = rng.choices(_OPERATIONS, (4, 4, 1))[0]
    small = rng.random() < 0.3
    a, b = (rng.randint(0, min(largest, 20) if small else largest) for _ in range(2))
    if name == "minus":
        a, b = max(a, b), min(a, b)
    result = {"plus": a + b, "minus": a - b, "times": a * b}[name]
    form = rng.choice(_FORMS + own_forms)
    shown = rng.choice(("x", "*", "×")) if name == "times" else sign
    text = form.format(a=a, b=b, o=name, s=shown)
    key = f"{name}|{a}|{b}" + (f"|{form}" if name == "times" else "")
    sentence = f"{a} {name} {b} is {result}."
    return Question("arithmetic", key, text, str(result), sentence)
