"""FrameVerbs: what the verbs of `df.llm` have in common; each family of verbs is a class on it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd

from nbllm.dataframe.call_options import CallOptions
from nbllm.dataframe.columns import text_array
from nbllm.dataframe.row_job import RowJob
from nbllm.errors import InvalidRequestError


class FrameVerbs:
    """Verbs on a frame, which is never changed: each returns a new one.

    Args:
        frame: with any index and columns.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def _answers(
        self, out: Hashable, names: Sequence[Hashable], overwrite: bool = False
    ) -> list[Any] | None:
        """The values of `out` that are there already, or None.

        Args:
            out: the column that a call is about.
            names: all columns that it adds.
            overwrite: they may be there.

        Raises:
            InvalidRequestError: a column would be replaced, or names have several levels.
        """
        if self._frame.columns.nlevels > 1:
            raise InvalidRequestError(
                f"the names of the columns have {self._frame.columns.nlevels} levels: make one of "
                "them first, as in df.columns = df.columns.map('_'.join)",
                parameter="out",
            )
        taken = [name for name in names if name in self._frame.columns]
        if taken and not overwrite:
            raise InvalidRequestError(
                f"column {taken[0]!r} exists; choose another name with out=, or pass "
                "overwrite=True to answer the rows that have no answer yet",
                parameter="out",
            )
        return self._frame[out].tolist() if out in taken else None


def read_options(options: dict[str, Any], **defaults: Any) -> CallOptions:
    """The arguments that all verbs have, checked.

    Raises:
        TypeError: there is no such argument.
        InvalidRequestError: one has a wrong value, or it is `job`, which a verb takes by itself.
    """
    if "job" in options:
        raise InvalidRequestError(
            "there is no job= here: the verb whose result it would be takes it",
            parameter="job",
        )
    try:
        checked = CallOptions(**(defaults | options))
    except TypeError:
        known = CallOptions.__dataclass_fields__
        wrong = next(name for name in options if name not in known)
        raise TypeError(f"there is no argument {wrong!r}") from None
    checked.check()
    return checked


def error_column(rows: RowJob, index: pd.Index[Any]) -> pd.Series[Any]:
    """Why each row failed; missing where it did not."""
    errors = rows.errors
    texts = [str(errors[row]) if row in errors else None for row in range(len(rows.results))]
    return text_array(texts, index)
