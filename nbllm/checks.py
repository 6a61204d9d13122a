"""Checks of single values that users pass: each returns the value in its plain form or raises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from nbllm.errors import InvalidRequestError


def fail(parameter: str, rule: str) -> NoReturn:
    """Raise the InvalidRequestError "`parameter` `rule`"."""
    raise InvalidRequestError(f"{parameter} {rule}", parameter=parameter)


def check_int(
    parameter: str, value: Any, *, minimum: int | None = None, maximum: int | None = None
) -> int:
    """An int, or what stands for one exactly (numpy's integers); neither bool nor float.

    Raises:
        InvalidRequestError: it is something else, or out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        fail(parameter, f"must be an integer, got {value!r}")
    try:
        number = int(value.__index__())
    except TypeError:  # arrays of more than one number have the method, too
        fail(parameter, f"must be an integer, got {value!r}")
    if minimum is not None and number < minimum:
        fail(parameter, f"must be at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        fail(parameter, f"must be at most {maximum}, got {number}")
    return number


def check_float(
    parameter: str, value: Any, *, minimum: float | None = None, maximum: float | None = None
) -> float:
    """A finite number as a float.

    Raises:
        InvalidRequestError: it is no number, NaN, infinite, or out of range.
    """
    try:
        number = float(value) if not isinstance(value, (bool, str, bytes)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):  # NaN would pass every comparison below
        fail(parameter, f"must be a finite number, got {value!r}")
    if minimum is not None and number < minimum:
        fail(parameter, f"must be at least {minimum:g}, got {number:g}")
    if maximum is not None and number > maximum:
        fail(parameter, f"must be at most {maximum:g}, got {number:g}")
    return number


def check_bool(parameter: str, value: Any) -> bool:
    """True or False; a string such as "false" would count as true.

    Raises:
        InvalidRequestError: it is something else.
    """
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool_", "bool") and type(value).__module__ == "numpy":
        return bool(value)
    fail(parameter, f"must be True or False, got {value!r}")


def check_list(parameter: str, value: Any) -> list[Any]:
    """The items of a list, tuple, set or array; None is no items.

    Raises:
        InvalidRequestError: it is no collection, or a string or mapping.
    """
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        fail(parameter, f"must be a list, got {value!r:.200}")
    return list(value)


def check_ids(parameter: str, value: Any) -> list[int]:
    """Token ids, as `check_list` takes them; None is none.

    Raises:
        InvalidRequestError: it is no collection of them, or one is negative.
    """
    return [check_int(parameter, token_id, minimum=0) for token_id in check_list(parameter, value)]


def check_bias(parameter: str, value: Any) -> dict[int, float]:
    """Token id -> bias, clamped to [-100, 100]; JSON can't have ids as keys, so digits will do.

    Raises:
        InvalidRequestError: it is no mapping, or of something else.
    """
    if not isinstance(value, Mapping):
        fail(parameter, f"must be a dict of token id -> number, got {value!r:.200}")
    bias: dict[int, float] = {}
    for key, number in value.items():
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token_id = check_int(parameter, int(key) if is_text else key, minimum=0)
        bias[token_id] = min(100.0, max(-100.0, check_float(parameter, number)))
    return bias
