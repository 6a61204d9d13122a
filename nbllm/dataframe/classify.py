"""Classify, score, filter: answers out of a given set, by their exact probabilities.

df.llm.classify("review", ["positive", "negative", "neutral"], out="mood")
df.llm.score("Is this urgent? {mail}")                  # a number for each row
df.llm.filter("Does this speak of money? {mail}")       # the rows for which it is so
df.llm.threshold("mood", 0.9), df.llm.coverage("mood")  # afterwards, without the model
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.call_options import check_choice
from nbllm.dataframe.frame_verbs import FrameVerbs
from nbllm.dataframe.label_call import (
    LabelCall,
    LabelScores,
    classify_call,
    label_call,
    labels_as_data,
    score_call,
)
from nbllm.dataframe.label_verb import read_labels
from nbllm.dataframe.row_job import RowJob
from nbllm.dataframe.sources import FrameSource, SeriesSource
from nbllm.errors import InvalidRequestError


class ClassifyVerbs(FrameVerbs):
    """`df.llm.classify`, `score`, `filter`, `threshold` and `coverage`."""

    def classify(
        self, column_or_template: Any, labels: Any, *, job: bool = False, **options: Any
    ) -> Any:
        """The likeliest of some labels for every row; returns a new frame with it in column `out`.

        Nothing is generated: the probability of each label's tokens is computed exactly, and
        normalized over the labels.

        Args:
            column_or_template: as in `generate`.
            labels: a list; an Enum or a Literal, whose values are the labels; or a dict from labels
                to the texts that are scored in their place.

        Keyword args:
            instruction: put before each text. None (the default) is, with a chat template,
                "Answer with the one of these that fits best: ...", else nothing; "" is nothing.
            calibrate: True divides by the probabilities that the labels have where every value is
                "N/A" (Zhao et al. 2021); it costs one row more.
            include: "p" (of the label), "margin" (its lead over the next best), "mass" (what
                share of the probability of all texts the labels have together) and "all" (a
                column `<out>_p[label]` for each label); default: p and margin.
            job: True returns at once with the `FrameJob` that `submit` returns, whose result is the
                frame; calibrating is part of it.
            out: name of the new column, default "label": categorical, with all labels.
            examples: a frame with the template's columns and `out`: shown before each row.
            overwrite: if `out` exists, answer again the rows that have none, and keep the others.
            chat, system, template_format, llm, na, errors, max_errors, dedupe, order, journal,
                use_tqdm, on_interrupt: as in `generate`.

        Raises:
            InvalidRequestError, Interrupted, JournalError: as `generate`.
        """
        return self._classify(column_or_template, labels, **options).answer(job)

    async def aclassify(self, column_or_template: Any, labels: Any, **options: Any) -> pd.DataFrame:
        """`classify` for any event loop; cancelling the task stops the rows."""
        answered: pd.DataFrame = await self._classify(
            column_or_template, labels, **options
        ).submit()
        return answered

    def score(
        self, column_or_template: Any, scale: Any = None, *, job: bool = False, **options: Any
    ) -> Any:
        """A number for every row, in column `out`: the expected value of the answer.

        Args:
            column_or_template: as in `generate`; a question to which the scale's labels are
                answers.
            scale: numbers by label; default {"yes": 1, "no": 0}, the probability of yes.

        Keyword args:
            out: name of the new column, default "score", a Float64.
            job, instruction, calibrate, examples (with labels in column `out`), overwrite, chat,
                system, template_format, llm, na, errors, max_errors, dedupe, order, journal,
                use_tqdm, on_interrupt: as in `classify`.

        Raises:
            InvalidRequestError, Interrupted, JournalError: as `generate`.
        """
        return self._score(column_or_template, scale, **options).answer(job)

    async def ascore(
        self, column_or_template: Any, scale: Any = None, **options: Any
    ) -> pd.DataFrame:
        """`score` for any event loop; cancelling the task stops the rows."""
        answered: pd.DataFrame = await self._score(column_or_template, scale, **options).submit()
        return answered

    def filter(
        self, column_or_template: Any, threshold: float = 0.5, *, job: bool = False, **options: Any
    ) -> Any:
        """The rows for which the answer is yes, with their index and columns.

        A row with missing values, or one that fails, is dropped, and a warning counts them.

        Args:
            column_or_template: as in `generate`; a question.
            threshold: rows with p(yes) above it are kept, from 0 to 1.

        Keyword args:
            keep_scores: p(yes) of the kept rows stays in column `<out>_p`; `threshold` can cut
                further. False by default.
            overwrite: that column may be there, and is replaced.
            labels: yes and no, in other words.
            out: default "filter".
            errors: "warn" (the default), or "raise".
            job, instruction, calibrate, examples, chat, system, template_format, llm, na, dedupe,
                order, journal, use_tqdm, on_interrupt: as in `classify`.

        Raises:
            InvalidRequestError, Interrupted, JournalError: as `generate`.
        """
        call = self._filter(column_or_template, threshold, **options)
        return call.answer(job)

    async def afilter(
        self, column_or_template: Any, threshold: float = 0.5, **options: Any
    ) -> pd.DataFrame:
        """`filter` for any event loop; cancelling the task stops the rows."""
        call = self._filter(column_or_template, threshold, **options)
        kept: pd.DataFrame = await call.submit()
        return kept

    def threshold(self, column: Hashable, at: float, other: Any = pd.NA) -> pd.DataFrame:
        """Cut by the probabilities that a verb has left in `<column>_p`; the model is not asked.

        Args:
            column: `out` of `classify`, where labels with a probability below `at` are replaced;
                or of `filter(keep_scores=True)`, of which rows above `at` are kept.
            at: from 0 to 1.
            other: what takes the place of those labels.

        Raises:
            InvalidRequestError: there is no such column, or `at` is not from 0 to 1.
        """
        frame, p = self._frame, self._probabilities(column)
        _check_share("at", at)
        if column not in frame.columns:
            return frame[p > at]
        labels = frame[column]
        if pd.notna(other) and isinstance(labels.dtype, pd.CategoricalDtype):
            if other not in labels.cat.categories:
                labels = labels.cat.add_categories([other])
        result = frame.copy()
        result[column] = labels.mask(p < at, other)
        return result

    def coverage(self, column: Hashable, truth: Hashable | None = None) -> pd.DataFrame:
        """What each threshold would keep, from the probabilities in `<column>_p`.

        Args:
            column: as in `threshold`.
            truth: the column with the right labels (of a filter: whether it is so); a missing one
                is left out of the precision.

        Returns:
            a row for each probability that occurs, ascending: threshold; coverage, the share of
            all rows that have at least this probability; and with `truth` precision, the share of
            right ones among these.

        Raises:
            InvalidRequestError: there is no such column.
        """
        frame, p = self._frame, self._probabilities(column)
        order = np.argsort(-p, kind="stable")
        order = order[~np.isnan(p[order])]
        ends = np.flatnonzero(np.diff(p[order], append=-1.0))  # the last row of each probability
        columns: dict[str, Any] = {
            "threshold": p[order][ends],
            "coverage": (ends + 1) / max(len(frame), 1),
        }
        if truth is not None:
            if truth not in frame.columns:
                raise InvalidRequestError(f"there is no column {truth!r}", parameter="truth")
            truths = frame[truth].to_numpy(dtype=object)[order]
            labels = frame[column] if column in frame.columns else pd.Series(True, frame.index)
            known = ~pd.isna(truths)
            pairs = zip(truths, labels.to_numpy(dtype=object)[order], known, strict=True)
            hits = np.array([bool(ok and right == label) for right, label, ok in pairs], dtype=int)
            with np.errstate(invalid="ignore"):
                columns["precision"] = np.cumsum(hits)[ends] / np.cumsum(known)[ends]
        return pd.DataFrame(columns)[::-1].reset_index(drop=True)

    def _classify(self, column_or_template: Any, labels: Any, **options: Any) -> LabelCall:
        return classify_call(FrameSource(self._frame, column_or_template), labels, **options)

    def _score(self, column_or_template: Any, scale: Any, **options: Any) -> LabelCall:
        return score_call(FrameSource(self._frame, column_or_template), scale, **options)

    def _filter(
        self,
        column_or_template: Any,
        threshold: float,
        *,
        keep_scores: bool = False,
        labels: Sequence[Any] = ("yes", "no"),
        out: Hashable = "filter",
        errors: str = "warn",
        overwrite: bool = False,
        **options: Any,
    ) -> LabelCall:
        _check_share("threshold", threshold)
        check_choice("errors", errors, ("warn", "raise"))
        if len(read_labels(labels)) != 2:
            raise InvalidRequestError("labels must be two: yes and no", parameter="labels")
        if keep_scores:
            self._answers(out, [f"{out}_p"], overwrite)

        def make_frame(scores: LabelScores, job: RowJob) -> pd.DataFrame:
            p = scores.p[:, 0]
            kept = self._frame[p > threshold]
            if keep_scores:
                kept = kept.assign(**{f"{out}_p": scores.column(p).array[p > threshold]})
            return kept

        source = FrameSource(self._frame, column_or_template)
        arguments = {
            "threshold": threshold,
            "keep_scores": keep_scores,
            "labels": labels_as_data(labels),
            "errors": errors,
        }
        # One warning counts all rows that are dropped; so the call itself does not warn.
        shown = "raise" if errors == "raise" else "column"
        call = label_call(
            "filter",
            source,
            labels,
            make_frame,
            out=out,
            arguments=arguments,
            **(options | {"errors": shown}),
        )
        call.rows.warn = _warn_of_dropped
        return call

    def _probabilities(self, column: Hashable) -> np.ndarray[Any, Any]:
        """[N] float64; NaN where it is missing."""
        name = f"{column}_p"
        if name not in self._frame.columns:
            raise InvalidRequestError(
                f"there is no column {name!r} with probabilities: classify with include=('p',), "
                "or filter with keep_scores=True",
                parameter="column",
            )
        return self._frame[name].to_numpy(dtype=np.float64, na_value=np.nan)


class ClassifySeriesVerbs:
    """`series.llm.classify` and `score`."""

    _series: pd.Series[Any]

    def classify(
        self, labels: Any, *, template: Any = None, job: bool = False, **options: Any
    ) -> Any:
        """The likeliest of some labels for every value; a frame with the index of the series.

        Args:
            labels: as in the DataFrame's `classify`, and so are the columns.
            template: text with the field `{}`, or a function; None takes the values as prompts.

        Keyword args:
            errors: "warn" (the default), "raise", or "column".

        The other arguments and errors are those of the DataFrame's `classify`.
        """
        return self._classify(labels, template, **options).answer(job)

    async def aclassify(self, labels: Any, *, template: Any = None, **options: Any) -> pd.DataFrame:
        """`classify` for any event loop; cancelling the task stops the rows."""
        answered: pd.DataFrame = await self._classify(labels, template, **options).submit()
        return answered

    def score(
        self, scale: Any = None, *, template: Any = None, job: bool = False, **options: Any
    ) -> Any:
        """A number for every value, a Float64 series with the same index.

        Args:
            scale: as in the DataFrame's `score`.
            template: as in `classify`.

        Keyword args:
            errors: "warn" (the default), or "raise".

        The other arguments and errors are those of the DataFrame's `score`.
        """
        return self._score(scale, template, **options).answer(job)

    async def ascore(
        self, scale: Any = None, *, template: Any = None, **options: Any
    ) -> pd.Series[Any]:
        """`score` for any event loop; cancelling the task stops the rows."""
        numbers: pd.Series[Any] = await self._score(scale, template, **options).submit()
        return numbers

    def _classify(self, labels: Any, template: Any, **options: Any) -> LabelCall:
        return classify_call(SeriesSource(self._series, template), labels, **options)

    def _score(self, scale: Any, template: Any, **options: Any) -> LabelCall:
        check_choice("errors", options.get("errors", "warn"), ("warn", "raise"))
        call = score_call(SeriesSource(self._series, template), scale, **options)
        make_frame = call.rows.make_frame
        call.rows.make_frame = lambda job: make_frame(job).iloc[:, 0]
        return call


def _check_share(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and 0.0 <= value <= 1.0):
        raise InvalidRequestError(f"{name} must be from 0 to 1, got {value!r}", parameter=name)


def _warn_of_dropped(job: RowJob, stacklevel: int) -> None:
    num_failed = len(job.errors)
    if num_failed or job.num_missing:
        first = f"; the first: {next(iter(job.errors.values()))}" if num_failed else ""
        warnings.warn(
            f"{num_failed + job.num_missing} rows have no answer and are dropped: "
            f"{job.num_missing} with missing values, {num_failed} that failed{first}",
            stacklevel=stacklevel,
        )
