"""Which rows belong to each group of a `groupby`, by what pandas makes public."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.prompts import is_missing
from nbllm.errors import InvalidRequestError


def group_rows(groups: Any, names: Sequence[Hashable]) -> tuple[pd.DataFrame, list[Any]]:
    """The frame that `agg` would make, without its columns, and the positions of each row's rows.

    Args:
        groups: a DataFrameGroupBy or a SeriesGroupBy.
        names: of columns that will be added.

    Raises:
        InvalidRequestError: a key has such a name.
    """
    sizes = groups.size()
    if isinstance(sizes, pd.DataFrame):  # as_index=False
        frame, counts = sizes.iloc[:, :-1].copy(), sizes.iloc[:, -1].to_numpy()
        keys = pd.MultiIndex.from_frame(frame)
    else:
        frame, counts = pd.DataFrame(index=sizes.index), sizes.to_numpy()
        keys = sizes.index
    for name in names:
        if name in frame.columns:
            raise InvalidRequestError(
                f"a key of the groups is named {name!r}; choose another name with out=",
                parameter="out",
            )
    if not groups.sort and keys.nlevels > 1 and not counts.all():
        # Where combinations that do not occur stand among the others depends on pandas' version.
        places = {known(key): place for place, key in enumerate(keys)}
        rows: list[Any] = [[] for _ in counts]
        used = pd.MultiIndex.from_tuples(list(groups.indices))
        for key, positions in zip(used, groups.indices.values(), strict=True):
            rows[places[known(key)]] = positions
        return frame, rows
    # Numbers are those of groups that have rows, in the order of the result; some groups (of
    # categories that do not occur) have none, and some rows (with a missing key) have no group.
    numbers = groups.ngroup().to_numpy(dtype=float, na_value=np.nan)
    order = np.argsort(numbers, kind="stable")
    order = order[numbers[order] >= 0]
    rows = np.split(order, np.cumsum(counts)[:-1]) if len(counts) else []
    return frame, rows


def known(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key that is equal to itself, also where values are missing."""
    return tuple(None if is_missing(value) else value for value in key)


def groupby_arguments(groups: Any) -> dict[str, Any] | None:
    """The arguments of the `groupby`, as JSON; None if its keys are no names of columns.

    Args:
        groups: a DataFrameGroupBy; of a SeriesGroupBy the frame is not known: None.
    """
    by = groups.keys
    names = by if isinstance(by, list) else [by]
    if not isinstance(groups.obj, pd.DataFrame) or groups.level is not None:
        return None
    if not all(isinstance(name, str) and name in groups.obj.columns for name in names):
        return None
    options = ("as_index", "sort", "dropna", "observed")
    return {"by": by} | {name: bool(getattr(groups, name)) for name in options}
