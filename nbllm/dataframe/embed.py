"""Embed: a vector for each row.

df.llm.embed("review")["embedding"]          # a numpy array of float32 in each cell
np.stack(df.llm.embed("review")["embedding"].dropna())
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.columns import Results
from nbllm.dataframe.frame_verbs import FrameVerbs, error_column, read_options
from nbllm.dataframe.generate_verb import arguments_as_json
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.journal import RowResult
from nbllm.dataframe.prompts import (
    frame_prompts,
    is_conversation,
    is_missing,
    series_prompts,
)
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import Part, RowJob, Verb
from nbllm.dataframe.sources import series_description
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.inputs import EncodedPrompt
from nbllm.llm import LLM
from nbllm.outputs import EmbeddingRequestOutput
from nbllm.pooling_params import PoolingParams


class Embed(Verb):
    """Vectors.

    Args:
        llm: does it.
        params: which vector stands for a prompt.
        truncate_prompt_tokens: as in `LLM.embed`.
    """

    def __init__(
        self, llm: LLM, params: PoolingParams, truncate_prompt_tokens: int | None = None
    ) -> None:
        self.llm = llm
        self._params = params
        self._max_prompt_tokens = llm._max_prompt_tokens(truncate_prompt_tokens)

    def render(self, prompt: Any) -> Any:
        return self.llm.render_chat(prompt) if is_conversation(prompt) else prompt

    def parts(self, row: int, prompt: EncodedPrompt) -> list[Part]:
        return [(prompt, self._params)]

    def identity(self, row: int) -> dict[str, Any]:
        params = self._params.or_default(self.llm.get_default_pooling_params())
        return {
            "verb": "embed",
            "pooling": params.pooling,
            "normalize": params.normalize,
            "dimensions": params.dimensions,
            "max_prompt_tokens": self._max_prompt_tokens,
        }

    def open(self, rows: Iterator[tuple[Any, Any, int]]) -> Any:
        return self.llm._embedding_call(rows, self._max_prompt_tokens)

    def result(self, outputs: list[EmbeddingRequestOutput], row: int) -> RowResult:
        output = outputs[0]
        return RowResult(
            numbers=array("f", output.outputs.embedding),
            num_prompt_tokens=len(output.prompt_token_ids),
        )


class EmbedVerbs(FrameVerbs):
    """`df.llm.embed`."""

    def embed(self, column_or_template: Any, *, job: bool = False, **options: Any) -> Any:
        """The vector of every row; returns a new frame with them in column `out`.

        Args:
            column_or_template: as in `generate`. Texts are embedded as they are, with no chat
                template; a list of messages in a cell goes through it.

        Keyword args:
            pooling: "last" is the hidden state of the last token, "cls" that of the first (encoders
                only), "mean" the mean of all; None (the default) is the model's own.
            normalize: vectors of length 1; None (the default) is the model's own, mostly yes.
            dimensions: only the first ones, for models that were trained so; None keeps all.
            truncate_prompt_tokens: take only so many tokens of a longer text, as `LLM.embed` does;
                -1 is what the model takes at most; None (the default) makes an error of it.
            out: name of the new column, default "embedding"; a float32 numpy array of shape
                [dimensions] per row, missing where there is none.
            job: True returns at once with the `FrameJob` that `submit` returns.
            overwrite, template_format, llm, na, errors, max_errors, dedupe, order, journal,
                use_tqdm, on_interrupt: as in `generate`.

        Raises:
            InvalidRequestError, Interrupted, JournalError: as `generate`.
        """
        return self._embed_call(column_or_template, **options).answer(job)

    async def aembed(self, column_or_template: Any, **options: Any) -> pd.DataFrame:
        """`embed` for any event loop; cancelling the task stops the rows."""
        result: pd.DataFrame = await self._embed_call(column_or_template, **options).submit()
        return result

    def _embed_call(
        self,
        column_or_template: Any,
        *,
        llm: LLM | None = None,
        out: Hashable = "embedding",
        overwrite: bool = False,
        template_format: str = "f-string",
        **options: Any,
    ) -> RowCall:
        frame = self._frame
        described = dict(
            options,
            column_or_template=column_or_template,
            out=out,
            overwrite=overwrite,
            template_format=template_format,
        )
        pooled = pop_pooling(options)
        checked = read_options(options, label="Embedding")
        names = [out, f"{out}_error"] if checked.errors == "column" else [out]
        old = self._answers(out, names, overwrite)
        prompts = frame_prompts(
            frame, column_or_template, template_format=template_format, na=checked.na
        )
        llm = llm or default_llm()

        def make_frame(rows: RowJob) -> pd.DataFrame:
            answered = frame.copy()
            answered[out] = vector_column(rows.results, frame.index, old)
            if checked.errors == "column":
                answered[f"{out}_error"] = error_column(rows, frame.index)
            return answered

        wanted = None if old is None else [r for r, cell in enumerate(old) if is_missing(cell)]
        description = JobDescription("embed", arguments_as_json(described), frame, len(frame), llm)
        return RowCall(Embed(llm, **pooled), prompts, checked, make_frame, wanted, description)


class EmbedSeriesVerbs:
    """`series.llm.embed`."""

    _series: pd.Series[Any]

    def embed(self, template: Any = None, *, job: bool = False, **options: Any) -> Any:
        """The vector of every value; returns a Series with the same index.

        Args:
            template: text with the field `{}`, or a function; None takes the values as they are.

        Keyword args:
            out: name of the result; default: that of the series.
            errors: "warn" (the default) leaves a missing vector and warns; "raise" raises the
                first error.

        The other arguments and errors are those of the DataFrame's `embed`, without `overwrite`.
        """
        return series_embedding(self._series, template, **options).answer(job)

    async def aembed(self, template: Any = None, **options: Any) -> pd.Series[Any]:
        """`embed` for any event loop; cancelling the task stops the rows."""
        call = series_embedding(self._series, template, **options)
        vectors: pd.Series[Any] = await call.submit()
        return vectors


def series_embedding(
    series: pd.Series[Any],
    template: Any = None,
    *,
    llm: LLM | None = None,
    out: Hashable = None,
    template_format: str = "f-string",
    **options: Any,
) -> RowCall:
    """The call that makes a Series of vectors of a Series; see `EmbedSeriesVerbs.embed`."""
    described = dict(options, template=template, out=out, template_format=template_format)
    pooled = pop_pooling(options)
    checked = read_options(options, errors="warn", label="Embedding")
    if checked.errors == "column":
        raise InvalidRequestError(
            "there is no column for errors: use errors='warn', or the DataFrame's embed",
            parameter="errors",
        )
    prompts = series_prompts(series, template, template_format=template_format, na=checked.na)

    def make_series(rows: RowJob) -> pd.Series[Any]:
        vectors = vector_column(rows.results, series.index)
        vectors.name = series.name if out is None else out
        return vectors

    llm = llm or default_llm()
    description = series_description(series, "embed", described, llm)
    return RowCall(Embed(llm, **pooled), prompts, checked, make_series, None, description)


def pop_pooling(options: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `Embed` out of those of a call.

    Raises:
        InvalidRequestError: one has a wrong value.
    """
    names = ("pooling", "normalize", "dimensions")
    params = PoolingParams(**{name: options.pop(name) for name in names if name in options})
    return {"params": params, "truncate_prompt_tokens": options.pop("truncate_prompt_tokens", None)}


def vector_column(
    results: Results, index: pd.Index[Any], old: list[Any] | None = None
) -> pd.Series[Any]:
    """A float32 array per row; pandas.NA where there is none.

    Args:
        results: with the vectors as `numbers`.
        index: of the column.
        old: what stands in rows without a result.
    """
    cells = np.empty(len(results), dtype=object)
    for row, result in enumerate(results):
        if result is not None:
            cells[row] = np.asarray(result.numbers, dtype=np.float32)
        else:
            cells[row] = pd.NA if old is None else old[row]
    return pd.Series(cells, index=index, dtype=object)
