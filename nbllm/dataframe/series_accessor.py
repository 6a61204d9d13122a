"""The `.llm` accessor of Series.

df["question"].llm.generate()
df["text"].llm.generate("Translate to French: {}", SamplingParams(temperature=0))
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from nbllm.dataframe.classify import ClassifySeriesVerbs
from nbllm.dataframe.columns import text_column
from nbllm.dataframe.embed import EmbedSeriesVerbs
from nbllm.dataframe.extract import ExtractSeriesVerbs
from nbllm.dataframe.frame_job import FrameJob
from nbllm.dataframe.frame_verbs import read_options
from nbllm.dataframe.generate_verb import Generate, Params, row_params
from nbllm.dataframe.prompts import series_prompts
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.dataframe.sources import series_description
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM


class SeriesAccessor(ClassifySeriesVerbs, EmbedSeriesVerbs, ExtractSeriesVerbs):
    """`series.llm`: see `generate`."""

    def __init__(self, series: pd.Series[Any]) -> None:
        self._series = series

    def generate(
        self,
        template: Any = None,
        sampling_params: Params = None,
        *,
        job: bool = False,
        **options: Any,
    ) -> Any:
        """Answer every value; returns a Series of answers with the same index.

        Args:
            template: text with the field `{}`, or a function; None takes the values as prompts.
            sampling_params: as in the DataFrame's `generate`.

        Keyword args:
            out: name of the result; default: that of the series.
            errors: "warn" (the default) leaves a missing answer and warns; "raise" raises the
                first error.

        The other arguments and errors are those of the DataFrame's `generate`.
        """
        return self._call(template, sampling_params, **options).answer(job)

    def submit(
        self, template: Any = None, sampling_params: Params = None, **options: Any
    ) -> FrameJob:
        """`generate` beside the cell: returns at once with a handle; its arguments are the same."""
        return self._call(template, sampling_params, **options).submit(has_card=True)

    async def agenerate(
        self, template: Any = None, sampling_params: Params = None, **options: Any
    ) -> pd.Series[Any]:
        """`generate` for any event loop; cancelling the task stops the rows."""
        answers: pd.Series[Any] = await self._call(template, sampling_params, **options).submit()
        return answers

    def _call(
        self,
        template: Any,
        sampling_params: Params = None,
        *,
        llm: LLM | None = None,
        out: Hashable = None,
        template_format: str = "f-string",
        chat: bool | str = "auto",
        system: str | None = None,
        **options: Any,
    ) -> RowCall:
        series = self._series
        checked = read_options(options, errors="warn")
        if checked.errors == "column":
            raise InvalidRequestError(
                "a Series has no column for errors: use errors='warn', or the DataFrame's accessor",
                parameter="errors",
            )
        prompts = series_prompts(series, template, template_format=template_format, na=checked.na)
        llm = llm or default_llm()
        described = dict(
            options,
            template=template,
            sampling_params=sampling_params,
            out=out,
            template_format=template_format,
            chat=chat,
            system=system,
        )
        verb = Generate(
            llm,
            row_params(sampling_params, llm, len(series)),
            chat=chat,
            system=system,
            keeps_tokens=checked.journal is not None,
        )

        def make_series(rows: RowJob) -> pd.Series[Any]:
            answers = text_column(rows.results, series.index)
            answers.name = series.name if out is None else out
            return answers

        description = series_description(series, "generate", described, llm)
        return RowCall(verb, prompts, checked, make_series, None, description)
