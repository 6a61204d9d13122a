"""Where the rows of a verb come from, and what its columns are added to: a frame or a series."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd

from nbllm.dataframe.frame_verbs import FrameVerbs
from nbllm.dataframe.generate_verb import Example, arguments_as_json, example_pairs
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.prompts import Prompts, frame_prompts, is_missing, series_prompts
from nbllm.dataframe.row_job import RowJob
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

CONTENT_FREE = "N/A"


class Source(Protocol):
    """Rows.

    Attributes:
        base: what new columns are added to a copy of.
        default_errors: what `errors` is if the user says nothing.
    """

    base: pd.DataFrame
    default_errors: str

    def prompts(self, **read: str) -> Prompts:
        """One per row; `read` are the arguments of `frame_prompts`."""

    def content_free(self, **read: str) -> Any:
        """The prompt of a row whose values are all "N/A"."""

    def examples(self, examples: Any, out: Hashable, **read: str) -> list[Example]:
        """Prompts and answers to show before each row."""

    def description(self, verb: str, arguments: Mapping[str, Any], llm: LLM) -> Any:
        """What is written beside a journal, or None."""


class FrameSource:
    """The rows of a frame.

    Args:
        frame: not changed.
        template: a column's name or a template, as in `frame_prompts`.
    """

    default_errors = "column"

    def __init__(self, frame: pd.DataFrame, template: Any) -> None:
        self.base = frame
        self._template = template

    def prompts(self, **read: str) -> Prompts:
        return frame_prompts(self.base, self._template, **read)

    def content_free(self, **read: str) -> Any:
        columns = self.base.columns
        row = pd.DataFrame([[CONTENT_FREE] * len(columns)], columns=columns, dtype=object)
        return frame_prompts(row, self._template, **read)[0]

    def examples(self, examples: Any, out: Hashable, **read: str) -> list[Example]:
        return example_pairs(examples, self._template, out, **read)

    def description(self, verb: str, arguments: Mapping[str, Any], llm: LLM) -> Any:
        known = arguments_as_json({"column_or_template": self._template, **arguments})
        return JobDescription(verb, known, self.base, len(self.base), llm)


class SeriesSource:
    """The values of a series; the columns stand alone, with its index.

    Args:
        series: not changed.
        template: as in `series_prompts`.
    """

    default_errors = "warn"

    def __init__(self, series: pd.Series[Any], template: Any) -> None:
        self.base = pd.DataFrame(index=series.index)
        self._series = series
        self._template = template

    def prompts(self, **read: str) -> Prompts:
        return series_prompts(self._series, self._template, **read)

    def content_free(self, **read: str) -> Any:
        row = pd.Series([CONTENT_FREE], name=self._series.name, dtype=object)
        return series_prompts(row, self._template, **read)[0]

    def examples(self, examples: Any, out: Hashable, **read: str) -> list[Example]:
        if examples is not None:
            raise InvalidRequestError(
                "examples need the DataFrame's accessor", parameter="examples"
            )
        return []

    def description(self, verb: str, arguments: Mapping[str, Any], llm: LLM) -> Any:
        known = {"template": self._template, **arguments}
        return series_description(self._series, verb, known, llm)


def series_description(
    series: pd.Series[Any], verb: str, arguments: Mapping[str, Any], llm: LLM
) -> JobDescription:
    """What is written beside the journal of a call of a series' accessor."""
    has_plain_name = series.name is None or isinstance(series.name, (str, int))
    known = arguments_as_json(arguments) if has_plain_name else None
    owner = {"series": series.name if has_plain_name else str(series.name)}
    frame = series.to_frame(name="value")
    return JobDescription(verb, known, frame, len(frame), llm, owner)


def unanswered(
    base: pd.DataFrame, names: Sequence[Hashable], num_answers: int, overwrite: bool
) -> list[int] | None:
    """Positions of the rows without an answer; None if there are no answers yet.

    Args:
        base: as in `Source`.
        names: columns that a call adds, those with answers first.
        num_answers: how many these are: a row has an answer if one of them has a value.
        overwrite: they may be there.

    Raises:
        InvalidRequestError: a column would be replaced.
    """
    FrameVerbs(base)._answers(names[0], names, overwrite)
    answers = [name for name in names[:num_answers] if name in base.columns]
    if not answers:
        return None
    missing = base[answers].isna().all(axis=1).to_numpy()
    return [int(row) for row in np.flatnonzero(missing)]


def with_columns(
    base: pd.DataFrame, columns: Mapping[Hashable, pd.Series[Any]], job: RowJob
) -> pd.DataFrame:
    """A copy of a frame with more columns, however many; its index, attrs and names are kept.

    Columns that are there already keep their values in rows that the job did not answer.

    Raises:
        InvalidRequestError: a column holds what the new one can't.
    """
    frame = base.copy()
    is_new = [r is not None or row in job.errors for row, r in enumerate(job.results)]
    added = {}
    for name, column in columns.items():
        if name in base.columns:
            frame[name] = _merged(base[name], column, is_new)
        else:
            added[name] = column
    if added:
        frame = pd.concat([frame, pd.DataFrame(added, index=base.index)], axis=1)
        frame.columns.names = base.columns.names
        frame.attrs = dict(base.attrs)
    return frame


def _merged(old: pd.Series[Any], new: pd.Series[Any], is_new: Sequence[bool]) -> pd.Series[Any]:
    values = [
        after if fresh else None if is_missing(before) else before
        for before, after, fresh in zip(old.tolist(), new.tolist(), is_new, strict=True)
    ]
    dtype: Any = object if any(isinstance(value, list) for value in values) else new.dtype
    try:
        if isinstance(dtype, pd.CategoricalDtype):
            strange = {v for v in values if not is_missing(v)} - set(dtype.categories)
            if strange:
                raise ValueError(f"{strange.pop()!r}")
        return pd.Series(pd.array([*values, None], dtype=dtype)[:-1], index=new.index)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"column {old.name!r} holds what is no {dtype}: {error}", parameter="overwrite"
        ) from error
