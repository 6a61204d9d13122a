"""LabelCall: one call of a verb that scores labels, from its arguments to its frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.call_options import CallOptions, check_choice
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.frame_verbs import error_column, read_options
from nbllm.dataframe.label_verb import ScoreLabels, probabilities, read_labels
from nbllm.dataframe.passes import Steps
from nbllm.dataframe.prompts import Prompts
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.dataframe.sources import Source, unanswered, with_columns
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

INCLUDE = ("p", "margin", "mass", "all")
YES_NO = {"yes": 1.0, "no": 0.0}
Columns = dict[Hashable, "pd.Series[Any]"]


@dataclass(slots=True)
class LabelScores:
    """What the rows came to.

    Attributes:
        labels: L of them.
        index: of the N rows.
        logprobs: [N, L] float64, log p of each label's tokens; NaN where a row has no result.
        bias: [L] float64, the same of an input without content, or zeros.
    """

    labels: list[Any]
    index: pd.Index[Any]
    logprobs: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]

    @property
    def p(self) -> np.ndarray[Any, Any]:
        """[N, L] float64, normalized over the labels."""
        return probabilities(self.logprobs, self.bias)

    def column(self, values: np.ndarray[Any, Any]) -> pd.Series[Any]:
        """[N] float64 as a column: NaN is missing."""
        array = pd.arrays.FloatingArray(np.ascontiguousarray(values), np.isnan(values))
        return pd.Series(array, index=self.index)


@dataclass(slots=True)
class LabelCall(FrameCall):
    """A call that calibrates, if that is wanted, and goes through the rows.

    Attributes:
        verb: scores.
        options: of the rows.
        rows: the pass over them.
        bias: [L] float64, see `LabelScores`.
        content_free: the prompt that calibrates, or None.
    """

    verb: ScoreLabels
    options: CallOptions
    bias: np.ndarray[Any, Any]
    content_free: Any = None
    rows: RowCall = field(init=False)

    def steps(self) -> Steps:
        """See `FrameCall.steps`.

        Raises:
            InvalidRequestError: the content-free prompt can't be scored.
        """
        if self.content_free is not None:
            prompts = Prompts({"": [self.content_free]}, 1, lambda values: values[""])
            none_ended = RowJob(self.verb, self.rows.prompts, rows=[])
            calibration = yield RowCall(
                self.verb,
                prompts,
                CallOptions(),
                lambda rows: self.rows.make_result(none_ended),
                is_counted=False,
            )
            (result,) = calibration.results
            if result is None:
                raise InvalidRequestError(
                    f"the content-free input can't be scored: {calibration.errors[0]}",
                    parameter="calibrate",
                )
            self.bias[:] = result.numbers
        return (yield from self.rows.steps())

    def scores(self, job: RowJob, index: pd.Index[Any]) -> LabelScores:
        """What the rows of a job came to."""
        labels = self.verb.labels
        logprobs = np.full((len(index), len(labels)), np.nan)
        for row, result in enumerate(job.results):
            if result is not None:
                logprobs[row] = result.numbers
        return LabelScores(labels, index, logprobs, self.bias)


def label_call(
    name: str,
    source: Source,
    labels: Any,
    make_frame: Callable[[LabelScores, RowJob], pd.DataFrame],
    *,
    out: Hashable,
    llm: LLM | None = None,
    chat: bool | str = "auto",
    system: str | None = None,
    template_format: str = "f-string",
    examples: pd.DataFrame | None = None,
    instruction: str | None = None,
    calibrate: bool = False,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> LabelCall:
    """The call of a verb.

    Args:
        name: of the verb, for the journal.
        source: rows.
        labels: as in `read_labels`.
        make_frame: (scores, rows) -> the result.
        out: the column of `examples` with the labels.
        arguments: of this verb alone, for the journal.
        options: of `CallOptions`.

    The others are those of `classify`.
    """
    checked = read_options(options, label="Scoring", errors=source.default_errors)
    check_choice("calibrate", calibrate, (True, False))
    read = {"template_format": template_format, "na": checked.na}
    prompts = source.prompts(**read)
    llm = llm or default_llm()
    verb = ScoreLabels(
        llm,
        labels,
        chat=chat,
        system=system,
        examples=source.examples(examples, out, **read),
        instruction=instruction,
    )
    call = LabelCall(verb, checked, np.zeros(len(verb.labels)))
    if calibrate:
        call.content_free = source.content_free(template_format=template_format)
    described = {
        "out": out,
        "chat": chat,
        "system": system,
        "template_format": template_format,
        "examples": examples,
        "instruction": instruction,
        "calibrate": calibrate,
        **options,
        **(arguments or {}),
    }

    def frame_of(job: RowJob) -> Any:
        return make_frame(call.scores(job, source.base.index), job)

    call.rows = RowCall(
        verb, prompts, checked, frame_of, None, source.description(name, described, llm)
    )
    return call


def classify_call(
    source: Source,
    labels: Any,
    *,
    include: str | Sequence[str] = ("p", "margin"),
    out: Hashable = "label",
    **options: Any,
) -> LabelCall:
    """The call of `classify`."""
    wanted = (include,) if isinstance(include, str) else tuple(include)
    for name in wanted:
        if name not in INCLUDE:
            raise InvalidRequestError(
                f"include may name {', '.join(INCLUDE)}, not {name!r}", parameter="include"
            )
    arguments = {"labels": labels_as_data(labels), "include": list(wanted)}

    def make_columns(scores: LabelScores) -> Columns:
        return _label_columns(scores, out, wanted)

    return _columns_call("classify", source, labels, make_columns, out, arguments, options)


def score_call(source: Source, scale: Any, *, out: Hashable = "score", **options: Any) -> LabelCall:
    """The call of `score`."""
    numbers = YES_NO if scale is None else scale
    if not isinstance(numbers, Mapping) or not all(map(_is_finite, numbers.values())):
        raise InvalidRequestError(
            f"scale must be a dict of numbers by label, got {scale!r}", parameter="scale"
        )
    weights = np.array(list(numbers.values()), dtype=np.float64)

    def make_columns(scores: LabelScores) -> Columns:
        return {out: scores.column(scores.p @ weights)}

    arguments = {"scale": dict(numbers)}
    return _columns_call("score", source, list(numbers), make_columns, out, arguments, options)


def _columns_call(
    name: str,
    source: Source,
    labels: Any,
    make_columns: Callable[[LabelScores], Columns],
    out: Hashable,
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> LabelCall:
    """A call that adds columns, `out` first; with `overwrite`, for rows without an answer."""
    overwrite = options.pop("overwrite", False)

    def make_frame(scores: LabelScores, job: RowJob) -> pd.DataFrame:
        columns = make_columns(scores)
        if call.options.errors == "column":
            columns[f"{out}_error"] = error_column(job, source.base.index)
        return with_columns(source.base, columns, job)

    arguments["overwrite"] = overwrite
    call = label_call(name, source, labels, make_frame, out=out, arguments=arguments, **options)
    names = list(make_columns(call.scores(RowJob(call.verb, []), source.base.index[:0])))
    if call.options.errors == "column":
        names.append(f"{out}_error")
    rows = call.rows
    rows.wanted = unanswered(source.base, names, 1, overwrite)
    if rows.wanted is not None:  # columns that can't be filled are found before rows are computed
        rows.make_frame(RowJob(call.verb, rows.prompts, rows=[]))
    return call


def _label_columns(scores: LabelScores, out: Hashable, include: Sequence[str]) -> Columns:
    p, labels = scores.p, scores.labels
    has_result = ~np.isnan(p[:, 0])
    best = np.where(has_result, p.argmax(axis=1), -1)
    column = pd.Categorical.from_codes(best, categories=pd.Index(labels, dtype=_dtype(labels)))
    columns: Columns = {out: pd.Series(column, index=scores.index)}
    ordered = np.sort(p, axis=1)
    if "p" in include:
        columns[f"{out}_p"] = scores.column(ordered[:, -1])
    if "margin" in include:
        columns[f"{out}_margin"] = scores.column(ordered[:, -1] - ordered[:, -2])
    if "mass" in include:
        columns[f"{out}_mass"] = scores.column(np.exp(scores.logprobs).sum(axis=1))
    if "all" in include:
        for place, label in enumerate(labels):
            columns[f"{out}_p[{label}]"] = scores.column(p[:, place])
    return columns


def labels_as_data(labels: Any) -> Any:
    """The same as a list or a dict, to be written beside a journal."""
    return dict(labels) if isinstance(labels, Mapping) else list(read_labels(labels))


def _dtype(labels: Sequence[Any]) -> Any:
    """Of the categories: that of the labels, and mixed ones as they are."""
    return None if len({type(label) for label in labels}) == 1 else object


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)
