"""Summarize: one text for each group of rows, however many there are.

    df.groupby("product").llm.summarize("review", instruction="What do the buyers complain about?")

The texts of a group are packed into prompts that fit the context, each prompt is answered, and the
answers are packed in turn, until one is left. The prompts of all groups are one batch, round by
round.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd
from pandas.api.typing import DataFrameGroupBy, SeriesGroupBy

from nbllm.checks import check_int
from nbllm.dataframe.call_options import check_choice
from nbllm.dataframe.citations import MAX_TOKENS, Cite, citation_table, citing
from nbllm.dataframe.frame_verbs import read_options
from nbllm.dataframe.generate_verb import Generate, Params, arguments_as_json, row_params
from nbllm.dataframe.group_rows import group_rows, groupby_arguments
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.packing import Packing
from nbllm.dataframe.prompts import frame_prompts, series_prompts
from nbllm.dataframe.summary_rounds import SummaryRounds
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

INSTRUCTION = "Summarize the following texts in one short paragraph."
CITE_INSTRUCTION = (
    "Summarize the following texts in a few short claims, as JSON; name the numbers of the texts "
    "that each claim stands on."
)


def register_groupby() -> None:
    """Give the groups of a DataFrame, and of a column of it, their `.llm`. Idempotent.

    pandas has a way to register accessors for frames only. A property on the public class is what
    that comes to; a column named "llm" of a grouped frame is `grouped["llm"]` then.
    """
    for owner, accessor in (
        (DataFrameGroupBy, GroupByAccessor),
        (SeriesGroupBy, SeriesGroupByAccessor),
    ):
        if not isinstance(getattr(owner, "llm", None), property):
            setattr(owner, "llm", property(accessor))  # noqa: B010 (mypy)


class GroupByAccessor:
    """`df.groupby(...).llm`: see `summarize`."""

    def __init__(self, groups: Any) -> None:
        self._groups = groups

    def summarize(self, column_or_template: Any, *, job: bool = False, **options: Any) -> Any:
        """A summary of each group's texts.

        Args:
            column_or_template: as in `generate`: what the text of a row is.

        Keyword args:
            instruction: what is asked of the model; it stands before the texts, and before the
                summaries of parts of a group that was too long for one prompt.
            cite: True makes the summary of claims, and adds the column `<out>_citations`: for
                each group a list with a `{"claim", "rows"}` dict per claim, "rows" being the
                labels of the rows that it stands on, all of that group. "table" returns these
                instead, a row for each claim and row: see `citation_table`.
            max_tokens: of a summary, default 128, with `cite` 256; two of them must fit a prompt.
                There are at most three claims, each of `max_tokens // 3` characters.
            sampling_params: as in `generate`, but the same for all.
            out: name of the new column, default "summary".
            na: "skip" leaves rows with missing values out, "fill" makes empty texts of them,
                "raise" refuses them.
            errors: "column" puts why a group has no summary into `<out>_error`; "warn" only warns;
                "raise" raises the first error.
            job: True returns at once with the `FrameJob` that `submit` returns.
            system, chat, template_format, llm, dedupe, order, journal, use_tqdm, on_interrupt: as
                in `generate`.

        Returns:
            a frame with a row for each group, as `agg` makes it: `as_index`, `sort`, `dropna` and
            `observed` of the `groupby` hold. A group without texts has no summary.

        Raises:
            InvalidRequestError: an argument is wrong; `.parameter` names it.
            Interrupted: Ctrl-C; `.partial` has the summaries so far.
            JournalError: the journal can't be used.
        """
        return self._rounds(column_or_template, **options).answer(job)

    async def asummarize(self, column_or_template: Any, **options: Any) -> pd.DataFrame:
        """`summarize` for any event loop; cancelling the task stops it."""
        summaries: pd.DataFrame = await self._rounds(column_or_template, **options).submit()
        return summaries

    def _rounds(self, column_or_template: Any, **options: Any) -> SummaryRounds:
        return _summary_rounds(self._groups, column_or_template, **options)


class SeriesGroupByAccessor:
    """`df.groupby(...)[column].llm`: see `summarize`."""

    def __init__(self, groups: Any) -> None:
        self._groups = groups

    def summarize(self, template: Any = None, *, job: bool = False, **options: Any) -> Any:
        """A summary of each group's values; returns a Series, as `agg` makes it.

        Args:
            template: text with the field `{}`, or a function; None takes the values as texts.

        Keyword args:
            out: name of the result; default: that of the column.
            errors: "warn" (the default) leaves a missing summary and warns; "raise" raises the
                first error.
            cite: "table" returns a frame with a row for each claim and row.

        Returns:
            a Series by group; with `as_index=False` a frame with the keys, too.

        The other arguments and errors are those of the DataFrame's `summarize`.
        """
        return _summary_rounds(self._groups, template, **options).answer(job)

    async def asummarize(self, template: Any = None, **options: Any) -> Any:
        """`summarize` for any event loop; cancelling the task stops it."""
        return await _summary_rounds(self._groups, template, **options).submit()


def _summary_rounds(
    groups: Any,
    source: Any,
    *,
    instruction: str | None = None,
    cite: bool | str = False,
    max_tokens: int | None = None,
    sampling_params: Params = None,
    out: Hashable = None,
    system: str | None = None,
    chat: bool | str = "auto",
    template_format: str = "f-string",
    llm: LLM | None = None,
    **options: Any,
) -> SummaryRounds:
    data = groups.obj
    is_series = isinstance(data, pd.Series)
    checked = read_options(options, label="Summarizing", errors="warn" if is_series else "column")
    check_choice("cite", cite, (True, False, "table"))
    if is_series and (checked.errors == "column" or cite is True):
        raise InvalidRequestError(
            "a Series has no column for errors or citations: use errors='warn' and cite='table', "
            "or the groups of the DataFrame",
            parameter="cite" if cite is True else "errors",
        )
    if max_tokens is None:
        max_tokens = MAX_TOKENS if cite else 128
    check_int("max_tokens", max_tokens, minimum=1)
    if isinstance(sampling_params, Sequence):
        raise InvalidRequestError(
            "sampling_params must be the same for all groups", parameter="sampling_params"
        )
    described = dict(
        options,
        instruction=instruction,
        cite=cite,
        max_tokens=max_tokens,
        sampling_params=sampling_params,
        out=out,
        system=system,
        chat=chat,
        template_format=template_format,
    )
    llm = llm or default_llm()
    params = row_params(sampling_params, llm, 1)(0).clone(max_tokens=max_tokens, n=1)
    if cite and params.structured_outputs is not None:
        raise InvalidRequestError(
            "with cite, sampling_params must leave structured_outputs alone",
            parameter="sampling_params",
        )
    read = {"template_format": template_format, "na": checked.na}
    if is_series:
        texts = series_prompts(data, source, **read)
        out = data.name if out is None else out
        described["template"] = source
    else:
        texts = frame_prompts(data, source, **read)
        out = "summary" if out is None else out
        described["column_or_template"] = source
    if checked.na == "raise" and any(texts.missing()):
        raise InvalidRequestError(
            f"{sum(texts.missing())} rows have missing values", parameter="na"
        )
    added = [out, f"{out}_error", *[f"{out}_citations"] * bool(cite)]
    frame, rows_of = group_rows(groups, added)
    if instruction is None:
        instruction = CITE_INSTRUCTION if cite else INSTRUCTION
    params_of = citing(params) if cite else lambda num_texts: params

    def verb_of(nums_texts: Sequence[int]) -> Generate:
        return (Cite if cite else Generate)(
            llm,
            lambda row: params_of(nums_texts[row]),
            chat=chat,
            system=system,
            keeps_tokens=checked.journal is not None,
        )

    def make_result(result: pd.DataFrame) -> Any:
        if cite == "table":
            return citation_table(result, out)
        return result[out] if is_series and groups.as_index else result

    known = groupby_arguments(groups)
    arguments = arguments_as_json(described) if known is not None else None
    described_frame = data.to_frame(name="value") if is_series else data
    owner = {"groupby": known, "column": None}
    return SummaryRounds(
        packing=Packing(verb_of([1]), params, instruction, numbered=bool(cite)),
        verb_of=verb_of,
        cells=[[(int(row), texts[row]) for row in rows] for rows in rows_of],
        options=checked,
        frame=frame,
        out=out,
        labels=data.index if cite else None,
        make_result=make_result,
        description=JobDescription("summarize", arguments, described_frame, len(frame), llm, owner),
    )
