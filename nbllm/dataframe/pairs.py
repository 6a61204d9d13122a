"""Pairs of rows of two frames, and the frame that a join makes of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.nearest import nearest, unit_rows
from nbllm.errors import InvalidRequestError

Suffixes = Sequence[str | None]


def similar_pairs(
    vectors: Sequence[Sequence[Any]], device: str, k: int, min_similarity: float
) -> pd.DataFrame:
    """The `k` most similar rows of the right side for each row of the left, best first.

    Args:
        vectors: of the left and of the right side, missing for rows that are in no pair.
        device: compares them.
        k: at least 1.
        min_similarity: of a pair.

    Returns:
        columns "left", "right" (positions), "similarity" (float32), in order of "left".

    Raises:
        InvalidRequestError: the vectors differ in dimensions, or are not finite.
    """
    left, left_rows = unit_rows(vectors[0], device, "left_on")
    right, right_rows = unit_rows(vectors[1], device, "right_on")
    columns, similarity = nearest(left, right, k, "right_on")
    pairs = pd.DataFrame(
        {
            "left": left_rows.repeat(columns.shape[1]),
            "right": right_rows[columns.ravel()],
            "similarity": similarity.ravel(),
        }
    )
    return pairs[pairs["similarity"] >= min_similarity]


def all_pairs(num_left: int, num_right: int) -> pd.DataFrame:
    """Every row of the left side with every row of the right: columns "left" and "right"."""
    return pd.DataFrame(
        {
            "left": np.arange(num_left).repeat(num_right),
            "right": np.tile(np.arange(num_right), num_left),
        }
    )


def merged(
    left: pd.DataFrame,
    right: pd.DataFrame,
    pairs: pd.DataFrame,
    out: Hashable,
    *,
    how: str = "inner",
    suffixes: Suffixes = ("_x", "_y"),
) -> pd.DataFrame:
    """What `pandas.merge` makes of pairs of rows, and their similarity.

    Args:
        left, right: any frames.
        pairs: columns "left" and "right" (positions), in order of "left"; "similarity".
        out: name of the column with the similarity.
        how: "left" adds the rows of `left` that are in no pair, at their place.
        suffixes: of columns that both frames have.

    Raises:
        InvalidRequestError: a frame has the column `out`.
    """
    for frame in (left, right):
        if out in frame.columns:
            raise InvalidRequestError(
                f"column {out!r} exists; choose another name with out=", parameter="out"
            )
    rows = pairs["left"].to_numpy()
    columns, similarity = pairs["right"].to_numpy(), pairs["similarity"].to_numpy()
    if how == "left":
        alone = np.setdiff1d(np.arange(len(left)), rows)
        order = np.argsort(np.concatenate([rows, alone]), kind="stable")
        rows = np.concatenate([rows, alone])[order]
        columns = np.concatenate([columns, np.full(len(alone), -1)])[order]
        missing = np.full(len(alone), np.nan, dtype=similarity.dtype)
        similarity = np.concatenate([similarity, missing])[order]
    numbered = right.reset_index(drop=True)
    # A row -1 does not exist, and comes out missing, with the dtypes that `merge` gives.
    partners = numbered.reindex(columns) if (columns < 0).any() else numbered.take(columns)
    result = left.take(rows).reset_index(drop=True)
    result = result.merge(
        partners.reset_index(drop=True),
        left_index=True,
        right_index=True,
        suffixes=tuple(suffixes),
    )
    result[out] = similarity
    return result
