"""Cosine similarity of every pair of vectors, exactly, in blocks that fit any memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbllm.dataframe.prompts import is_missing
from nbllm.errors import InvalidRequestError

_ROWS, _COLUMNS = 1024, 8192  # of a block of similarities: 32 MB
_MIN_NORM = 1e-12  # a vector of zeros stays one: it is similar to nothing
_LAST = 0x7FFFFFFF


def unit_rows(
    cells: Sequence[Any], device: str, parameter: str
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """The vectors of a column, each of length 1, and the positions of the cells that have one.

    Args:
        cells: a sequence of numbers each, or missing.
        device: of the result.
        parameter: who is to blame for vectors that are none.

    Returns:
        float32 [number of vectors, dimensions] and int64 [number of vectors].

    Raises:
        InvalidRequestError: they differ in dimensions, or a number is not finite.
    """
    positions = [position for position, cell in enumerate(cells) if not is_missing(cell)]
    if not positions:
        return torch.zeros(0, 0, device=device), np.zeros(0, dtype=np.int64)
    rows = [np.asarray(cells[position], dtype=np.float32).ravel() for position in positions]
    if len({len(row) for row in rows}) > 1:
        raise InvalidRequestError("the vectors differ in dimensions", parameter=parameter)
    vectors = torch.from_numpy(np.stack(rows)).to(device)
    if not bool(torch.isfinite(vectors).all()):
        raise InvalidRequestError("the vectors have numbers that are none", parameter=parameter)
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / norms.clamp_min(_MIN_NORM), np.array(positions, dtype=np.int64)


def nearest(
    left: Tensor, right: Tensor, k: int, parameter: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The `k` rows of `right` that are most similar to each row of `left`, best first.

    Of rows that are as similar, the first ones are taken.

    Args:
        left: unit vectors, float32 [rows, dimensions].
        right: the same, [columns, dimensions].
        k: all columns, if there are fewer.
        parameter: who is to blame for vectors of other dimensions.

    Returns:
        positions in `right`, int64 [rows, min(k, columns)], and similarities, float32.

    Raises:
        InvalidRequestError: the two sides differ in dimensions.
    """
    k = min(k, len(right))
    if not len(left) or not k:
        return np.zeros((len(left), 0), np.int64), np.zeros((len(left), 0), np.float32)
    if left.shape[1] != right.shape[1]:
        raise InvalidRequestError(
            f"vectors of {left.shape[1]} dimensions can't be compared with vectors of "
            f"{right.shape[1]}",
            parameter=parameter,
        )
    kept = []
    for rows in left.split(_ROWS):
        best = rows.new_zeros((len(rows), 0), dtype=torch.int64)
        for start in range(0, len(right), _COLUMNS):
            keys = _as_keys(rows @ right[start : start + _COLUMNS].T, start)
            best = torch.cat([best, _largest(keys, k)], dim=1)
            best = _largest(best, k)
        kept.append(best.cpu())
    keys = torch.cat(kept)
    return (_LAST - (keys & _LAST)).numpy(), _similarities(keys).numpy()


def similar_groups(vectors: Tensor, min_similarity: float) -> np.ndarray[Any, Any]:
    """Groups of rows that are linked by pairs of at least so much similarity.

    Args:
        vectors: unit vectors, float32 [rows, dimensions].
        min_similarity: of a pair.

    Returns:
        for each row the first row of its group, int64 [rows].
    """
    first = np.arange(len(vectors))
    for top in range(0, len(vectors), _ROWS):
        rows = vectors[top : top + _ROWS]
        for start in range(top, len(vectors), _COLUMNS):
            similarity = rows @ vectors[start : start + _COLUMNS].T
            is_linked = similarity >= min_similarity
            of_columns = torch.from_numpy(first[start : start + _COLUMNS]).to(vectors.device)
            of_rows = torch.from_numpy(first[top : top + _ROWS]).to(vectors.device)
            is_linked &= of_rows[:, None] != of_columns  # most of what is linked is known to be
            pairs = is_linked.nonzero().cpu().numpy()
            first = _link(first, pairs[:, 0] + top, pairs[:, 1] + start)
    return first


def _link(
    first: np.ndarray[Any, Any], left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The first row of each row's group, when the rows `left` and `right` are linked, too."""
    while True:
        left_first, right_first = first[left], first[right]
        differ = left_first != right_first
        if not differ.any():
            return first
        left, right = left[differ], right[differ]
        low = np.minimum(left_first, right_first)[differ]
        high = np.maximum(left_first, right_first)[differ]
        first = first.copy()
        np.minimum.at(first, high, low)
        while (first[first] != first).any():
            first = first[first]


def _as_keys(similarity: Tensor, first_column: int) -> Tensor:
    """int64 keys that are in order of similarity, and for the same one of the columns' reverse.

    The upper half is the float's bits, made so that they are in order as integers.
    """
    # -0.0 becomes 0.0, which has other bits.
    bits = (similarity.clamp(-1.0, 1.0) + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _LAST, bits).to(torch.int64)
    columns = torch.arange(first_column, first_column + similarity.shape[1], device=bits.device)
    return (ordered << 32) | (_LAST - columns)


def _similarities(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).to(torch.int32)
    return torch.where(ordered < 0, ordered ^ _LAST, ordered).view(torch.float32)


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1).values
