"""From what the rows came to, to the columns of the frame that is returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pandas as pd

from nbllm.dataframe.journal import RowResult
from nbllm.errors import InvalidRequestError

Results = Sequence[RowResult | None]

INCLUDE = ("finish", "usage", "conf", "ppl", "margin", "logprobs")
NEEDS_LOGPROBS = {"conf": 0, "ppl": 0, "margin": 2, "logprobs": 0}
"""Columns that are made from log-probabilities, and the least `logprobs` that they need."""
_DTYPES = {
    "finish": "string",
    "conf": "Float64",
    "ppl": "Float64",
    "margin": "Float64",
    "logprobs": "object",
}
"""Of the columns that have a value per text, where no row has several."""


def names_of(out: Hashable, include: Sequence[str], errors: str) -> list[Hashable]:
    """The columns that a call adds, `out` first.

    Raises:
        InvalidRequestError: there is no such column to include.
    """
    unknown = [name for name in include if name not in INCLUDE]
    if unknown:
        raise InvalidRequestError(
            f"include may name {', '.join(INCLUDE)}, not {unknown[0]!r}", parameter="include"
        )
    names: list[Hashable] = [out]
    if errors == "column":
        names.append(f"{out}_error")
    for name in include:
        if name == "usage":
            names += [f"{out}_{kind}_tokens" for kind in _COUNTS]
        else:
            names.append(f"{out}_{name}")
    return names


def text_column(results: Results, index: pd.Index[Any]) -> pd.Series[Any]:
    """A text per row (missing: pandas.NA), or a list of texts where some row has several."""
    texts = [None if result is None else _one_or_all(result.texts) for result in results]
    return text_array(texts, index)


def text_array(values: list[Any], index: pd.Index[Any]) -> pd.Series[Any]:
    """A column of texts, or of lists of texts."""
    if any(isinstance(value, list) for value in values):
        return _object_array(values, index)
    return pd.Series(pd.array(values, dtype="string"), index=index)


def included(
    results: Results, index: pd.Index[Any], out: Hashable, include: Sequence[str]
) -> dict[Hashable, pd.Series[Any]]:
    """The columns that `include` names."""
    columns: dict[Hashable, pd.Series[Any]] = {}
    for name in include:
        if name == "usage":
            for kind, count in _COUNTS.items():
                values = [None if result is None else count(result) for result in results]
                columns[f"{out}_{kind}_tokens"] = pd.Series(
                    pd.array(values, dtype="Int64"), index=index
                )
        elif name == "finish":
            texts = [None if r is None else _one_or_all(r.finish_reasons) for r in results]
            columns[f"{out}_finish"] = text_array(texts, index)
        elif name == "logprobs":
            tokens = [None if r is None else _one_or_all(r.logprobs) for r in results]
            columns[f"{out}_logprobs"] = _object_array(tokens, index)
        else:
            numbers = [None if r is None else _one_or_all(_numbers(r, name)) for r in results]
            columns[f"{out}_{name}"] = _float_array(numbers, index)
    return columns


def exploded(frame: pd.DataFrame, out: Hashable, include: Sequence[str]) -> pd.DataFrame:
    """A row for each text of a row, with what is included of that text; counts of tokens stay.

    Args:
        frame: with the columns of a call; changed.
        out, include: of the call.
    """
    if frame[out].dtype != object:  # a text per row
        return frame
    several = frame[out].map(pd.api.types.is_list_like)
    names = {out: "string"}
    for name in include:
        if name == "logprobs":  # a list, where there is one text, too
            cells = zip(frame[f"{out}_logprobs"], several, strict=True)
            lists = [cell if is_list else [cell] for cell, is_list in cells]
            frame[f"{out}_logprobs"] = _object_array(lists, frame.index)
        if name != "usage":
            names[f"{out}_{name}"] = _DTYPES[name]
    of_lists = [name for name in names if frame[name].dtype == object]
    return frame.explode(of_lists).astype({name: names[name] for name in of_lists})


def _numbers(result: RowResult, name: str) -> list[float]:
    """`conf`: geometric mean of the tokens' probabilities; `ppl`: its inverse, the perplexity;
    `margin`: smallest lead, in nats, of a token over the next best."""
    numbers = []
    for place, num_tokens in enumerate(result.num_tokens):
        total, margin = result.numbers[2 * place : 2 * place + 2]
        mean = total / max(num_tokens, 1)
        numbers.append({"conf": math.exp(mean), "ppl": math.exp(-mean), "margin": margin}[name])
    return numbers


def _float_array(values: list[Any], index: pd.Index[Any]) -> pd.Series[Any]:
    if any(isinstance(value, list) for value in values):
        return _object_array(values, index)
    return pd.Series(pd.array(values, dtype="Float64"), index=index)


def _object_array(values: list[Any], index: pd.Index[Any]) -> pd.Series[Any]:
    return pd.Series(pd.array([*values, None], dtype=object)[:-1], index=index)


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


_COUNTS: dict[str, Callable[[RowResult], int]] = {
    "prompt": lambda result: result.num_prompt_tokens,
    "cached": lambda result: result.num_cached_tokens,
    "completion": lambda result: sum(result.num_tokens),
}
"""The columns of "usage"."""
