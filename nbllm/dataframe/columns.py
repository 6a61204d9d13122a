"""From what the rows came to, to the columns of the frame that is returned."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd

from nbllm.dataframe.journal import RowResult
from nbllm.errors import InvalidRequestError

Results = Sequence[RowResult | None]

INCLUDE = ("finish", "usage", "conf", "ppl", "margin")
NEEDS_LOGPROBS = {"conf": 0, "ppl": 0, "margin": 2}
"""Columns that are made from log-probabilities, and the least `logprobs` that they need."""


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
            names += [f"{out}_prompt_tokens", f"{out}_completion_tokens"]
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
        return pd.Series(pd.array([*values, None], dtype=object)[:-1], index=index)
    return pd.Series(pd.array(values, dtype="string"), index=index)


def included(
    results: Results, index: pd.Index[Any], out: Hashable, include: Sequence[str]
) -> dict[Hashable, pd.Series[Any]]:
    """The columns that `include` names."""
    columns: dict[Hashable, pd.Series[Any]] = {}
    for name in include:
        if name == "usage":
            for kind, count in (("prompt", _prompt_tokens), ("completion", _completion_tokens)):
                values = [None if result is None else count(result) for result in results]
                columns[f"{out}_{kind}_tokens"] = pd.Series(
                    pd.array(values, dtype="Int64"), index=index
                )
        elif name == "finish":
            texts = [None if r is None else _one_or_all(r.finish_reasons) for r in results]
            columns[f"{out}_finish"] = text_array(texts, index)
        else:
            numbers = [None if r is None else _one_or_all(_numbers(r, name)) for r in results]
            columns[f"{out}_{name}"] = _float_array(numbers, index)
    return columns


def exploded(frame: pd.DataFrame, names: Sequence[Hashable]) -> pd.DataFrame:
    """A row for each item of the lists in some columns, which are of one length in a row.

    Args:
        frame: columns without lists stay as they are.
        names: of the columns; those of lists become "string" or "Float64".
    """
    of_lists = [name for name in names if frame[name].dtype == object]
    if not of_lists:
        return frame
    result = frame.explode(of_lists)
    for name in of_lists:
        is_text = any(isinstance(value, str) for value in result[name])
        result[name] = result[name].astype("string" if is_text else "Float64")
    return result


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
        return pd.Series(pd.array([*values, None], dtype=object)[:-1], index=index)
    return pd.Series(pd.array(values, dtype="Float64"), index=index)


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _prompt_tokens(result: RowResult) -> int:
    return result.num_prompt_tokens


def _completion_tokens(result: RowResult) -> int:
    return sum(result.num_tokens)
