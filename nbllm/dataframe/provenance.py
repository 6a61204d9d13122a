"""Provenance: a frame says where its columns come from, and that can be checked.

`frame.attrs["nbllm"]` has, for each column that a call has made, the call, the model and what
stands for its weights. pandas keeps it through most operations, and in Parquet.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import pandas as pd

from nbllm.dataframe.generate_verb import arguments_from_json, row_params
from nbllm.dataframe.jobs import JobDescription, describe, find_llm
from nbllm.dataframe.prompts import is_missing
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

_ATTRS = "nbllm"


def with_provenance(result: pd.DataFrame, description: JobDescription) -> pd.DataFrame:
    """A frame that says of its new columns what made them."""
    made = describe(description)
    new = [str(column) for column in result.columns if column not in description.frame.columns]
    result.attrs = result.attrs | {_ATTRS: result.attrs.get(_ATTRS, {}) | dict.fromkeys(new, made)}
    return result


def reproduce(
    frame: pd.DataFrame,
    column: Hashable | None = None,
    *,
    rows: int = 8,
    seed: int = 0,
    llm: LLM | None = None,
) -> pd.DataFrame:
    """Make some rows of a column again, each alone, and compare.

    Args:
        frame: with the columns that the call read, and the one that it made.
        column: that one; None is the one that was made last.
        rows: how many, chosen by chance; those without an answer are left out.
        seed: of the choice.
        llm: who answers; default: the one that is open, if it is the model that made the column,
            else that model is loaded.

    Returns:
        a frame with the chosen rows' index and columns before, now, same.

    Raises:
        InvalidRequestError: nothing is known of the column, or its call can't be made again (a
            function as its template, or sampling without a seed).
    """
    known = frame.attrs.get(_ATTRS, {})
    name = _last_call(known) if column is None else str(column)
    if name not in known or name not in frame.columns:
        raise InvalidRequestError(
            f"this frame does not say how a column {name!r} was made", parameter="column"
        )
    call = known[name]
    if call["arguments"] is None:
        raise InvalidRequestError(
            f"the call that made {name!r} can't be made again: a function, or another thing that "
            "is no data, is among its arguments",
            parameter="column",
        )
    arguments = arguments_from_json(call["arguments"])
    llm = llm or find_llm(call["model"])
    if call["verb"] == "generate":  # the other verbs take no chances unless they are told to
        params = row_params(arguments.get("sampling_params"), llm, 1)(0)
        if not params.is_greedy and params.seed is None:
            raise InvalidRequestError(
                f"{name!r} was sampled without a seed: it can't come out twice", parameter="column"
            )
    answered = [place for place, value in enumerate(frame[name]) if not is_missing(value)]
    places = sorted(random.Random(seed).sample(answered, min(rows, len(answered))))
    bare = frame.drop(columns=[c for c in frame.columns if known.get(str(c)) == call])
    arguments |= {"llm": llm, "use_tqdm": False, "overwrite": False}
    before = frame[name].iloc[places]
    alone = [
        getattr(bare.iloc[[place]].llm, call["verb"])(**arguments)[name].iloc[0] for place in places
    ]
    same = [_equal(was, now) for was, now in zip(before, alone, strict=True)]
    return pd.DataFrame(
        {"before": before.tolist(), "now": alone, "same": same}, index=frame.index[places]
    )


def _last_call(known: dict[str, Any]) -> str:
    """The first column of the call that was made last."""
    last = next(reversed(known.values()), None)
    return next((name for name, call in known.items() if call == last), "")


def _equal(was: Any, now: Any) -> bool:
    return bool(list(was) == list(now)) if isinstance(was, list) else bool(was == now)
