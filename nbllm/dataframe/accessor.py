"""The `.llm` accessors of DataFrame and Series.

    df.llm.generate("question", out="answer")
    df.llm.generate("Translate to French: {text}", SamplingParams(temperature=0), out="french")

The rows go through the `LLM`: one continuous batch with every other caller. A row that
fails has a missing answer and its error, and the others are not affected.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pandas as pd

from nbllm.dataframe.call_options import check_choice
from nbllm.dataframe.classify import ClassifyVerbs
from nbllm.dataframe.columns import NEEDS_LOGPROBS, exploded, included, names_of, text_column
from nbllm.dataframe.embed import EmbedVerbs
from nbllm.dataframe.extract import ExtractVerbs
from nbllm.dataframe.frame_job import FrameJob
from nbllm.dataframe.frame_verbs import FrameVerbs, error_column, read_options
from nbllm.dataframe.generate_verb import (
    Generate,
    Params,
    arguments_as_json,
    example_pairs,
    row_params,
    with_logprobs,
)
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.lint import LintReport, lint
from nbllm.dataframe.prompts import frame_prompts, is_missing
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.dataframe.semantic_join import JoinVerbs
from nbllm.dataframe.series_accessor import SeriesAccessor
from nbllm.dataframe.similarity import SimilarityVerbs
from nbllm.dataframe.sources import unanswered, with_columns
from nbllm.dataframe.summarize import register_groupby
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM


def register() -> None:
    """Give DataFrame, its groups and Series their `.llm`. Idempotent."""
    for owner, accessor in ((pd.DataFrame, DataFrameAccessor), (pd.Series, SeriesAccessor)):
        if getattr(owner, "llm", None) is not accessor:
            getattr(pd.api.extensions, f"register_{owner.__name__.lower()}_accessor")("llm")(
                accessor
            )
    register_groupby()


class DataFrameAccessor(
    ClassifyVerbs, EmbedVerbs, ExtractVerbs, JoinVerbs, SimilarityVerbs, FrameVerbs
):
    """`df.llm`: see `generate`."""

    def generate(
        self,
        column_or_template: Any,
        sampling_params: Params = None,
        *,
        job: bool = False,
        **options: Any,
    ) -> Any:
        """Answer every row; returns a new frame with the answers in column `out`.

        Args:
            column_or_template: a column's name, or text with `{column}` fields; a
                `jinja2.Template`; or a function from a row (a dict) to a prompt. A cell may also
                hold token ids, or a list of messages.
            sampling_params: one for all rows, or one each; or a dict of fields, each a value for
                all rows or a Series with one a row. None is what the model recommends.

        Keyword args:
            llm: default: that of `nbllm.set_default_llm`, else the `LLM` made last, else the
                bundled demo model.
            out: name of the new column, default "llm"; a text per row, or with `n > 1` a list.
            include: more columns, each `<out>_<name>`: "finish" (stop or length), "usage"
                (prompt_tokens, cached_tokens: those of them found in the prefix cache, and
                completion_tokens; of a row that came from its twin or the journal: what that has
                cost), "conf" (geometric mean of the tokens' probabilities), "ppl" (its inverse),
                "margin" (smallest lead of a token over the next best, in nats), "logprobs" (a list
                with a `{"token", "token_id", "logprob", "top"}` dict per token; "top" are the
                likeliest ones, best first, as many as `logprobs` of the sampling parameters).
            explode: with `n > 1`, a row for each text, as `DataFrame.explode` makes them; "usage"
                is that of all together, what else is included that of the text.
            template_format: "f-string", or "jinja2" for text in that language.
            examples: a frame with the template's columns and `out`: shown before each row.
            chat: True sends the prompt as a user's message through the chat template, False as
                it is; "auto" (the default) does the first if the model has a template.
            system: a system message for every row (implies chat).
            na: "skip" leaves rows with missing values unanswered, "fill" makes empty texts of
                them, "raise" refuses them.
            errors: "column" puts why a row failed into `<out>_error` (missing where it did not);
                "warn" only warns; "raise" raises the first error, with the frame in `nbllm.last`.
            max_errors: once more rows than that have failed, the call stops and raises
                RequestFailedError, with the frame so far in `nbllm.last`: a number, or below 1.0 a
                share of all rows. None (the default) is as many as there are.
            overwrite: if `out` exists, answer again those rows that have no answer, and keep the
                others; without it an existing column is an error.
            dedupe: compute rows that are alike once; "auto": unless chance decides (sampling
                without a seed).
            order: "prefix" computes together what begins alike, "given" goes row by row.
            journal: a name, or a folder: results are kept there as they come, and found again by
                the same call, or by `nbllm.resume(name)` after a crash.
            use_tqdm: show progress; or a callable that makes a tqdm-like bar.
            on_interrupt: "raise" raises `Interrupted`, whose `.partial` is the frame so far, also
                in `nbllm.last`; "return" returns it, with "interrupted" as the error of the rest.
            job: True is `submit`: the handle comes at once.

        Raises:
            InvalidRequestError: an argument is wrong; `.parameter` names it.
            Interrupted: Ctrl-C; the engine and its other callers go on.
            JournalError: the journal can't be used.
            RequestFailedError: more than `max_errors` rows have failed; `__cause__` is the first
                error.
        """
        return self._call(column_or_template, sampling_params, **options).answer(job)

    def submit(
        self, column_or_template: Any, sampling_params: Params = None, **options: Any
    ) -> FrameJob:
        """`generate` beside the cell: returns at once with a handle; its arguments are the same."""
        return self._call(column_or_template, sampling_params, **options).submit(has_card=True)

    async def agenerate(
        self, column_or_template: Any, sampling_params: Params = None, **options: Any
    ) -> Any:
        """`generate` for any event loop; cancelling the task stops the rows."""
        return await self._call(column_or_template, sampling_params, **options).submit()

    def chat(
        self,
        column: Hashable,
        sampling_params: Params = None,
        *,
        job: bool = False,
        **options: Any,
    ) -> Any:
        """`generate` for a column of conversations: lists of `{"role", "content"}` messages.

        Args:
            column: their name.
            reply: "text", or "messages" for the conversation with the answer at its end.

        The other arguments and errors are those of `generate`.
        """
        return self._chat(column, sampling_params, **options).answer(job)

    async def achat(
        self, column: Hashable, sampling_params: Params = None, **options: Any
    ) -> pd.DataFrame:
        """`chat` for any event loop; cancelling the task stops the rows."""
        answered: pd.DataFrame = await self._chat(column, sampling_params, **options).submit()
        return answered

    def retry(self, **arguments: Any) -> Any:
        """Answer again the rows without an answer: `generate(..., overwrite=True)`."""
        return self.generate(**arguments, overwrite=True)

    def stream(
        self, column_or_template: Any, sampling_params: Params = None, **options: Any
    ) -> Iterator[pd.DataFrame]:
        """`generate`, piece by piece: frames of the rows that have ended since the last one.

        Closing the iterator stops the other rows. The arguments are those of `generate`.
        """
        return self._call(column_or_template, sampling_params, **options).stream()

    def lint(
        self,
        column_or_template: Any,
        sampling_params: Params = None,
        *,
        probe: int = 32,
        samples: int = 2,
        **options: Any,
    ) -> LintReport:
        """What `generate` would do with the same arguments: rendered samples, exact counts of
        tokens, rows that fail or are cut, missing values, columns that the template leaves out,
        duplicates, shared beginnings, KV cache, and time.

        Args:
            probe: rows that are answered to estimate the time; 0 spends no token.
            samples: prompts to show.
        """
        call = self._call(column_or_template, sampling_params, **options)
        params_of = row_params(sampling_params, call.verb.llm, len(self._frame))
        params = [params_of(row) for row in range(len(self._frame))]
        has_fields = isinstance(column_or_template, str) and column_or_template not in self._frame
        named = call.prompts.num_missing()
        unused = [name for name in self._frame.columns if has_fields and name not in named]
        return lint(call, params, unused=unused, probe=probe, samples=samples)

    def _chat(
        self,
        column: Hashable,
        sampling_params: Params,
        *,
        reply: str = "text",
        out: Hashable = "llm",
        **options: Any,
    ) -> RowCall:
        check_choice("reply", reply, ("text", "messages"))
        if not (isinstance(column, Hashable) and column in self._frame.columns):
            raise InvalidRequestError(f"there is no column {column!r}", parameter="column")
        call = self._call(column, sampling_params, chat=True, out=out, **options)
        if reply == "messages":
            make_frame = call.make_frame

            def with_conversations(rows: RowJob) -> pd.DataFrame:
                answered: pd.DataFrame = make_frame(rows)
                said = zip(self._frame[column], answered[out], strict=True)
                conversations: Any = [
                    None if is_missing(text) else [*_messages(before), _assistant(text)]
                    for before, text in said
                ]
                answered[out] = conversations
                return answered

            call.make_frame = with_conversations
        return call

    def _call(
        self,
        column_or_template: Any,
        sampling_params: Params = None,
        *,
        llm: LLM | None = None,
        out: Hashable = "llm",
        include: Sequence[str] = (),
        explode: bool = False,
        template_format: str = "f-string",
        examples: pd.DataFrame | None = None,
        chat: bool | str = "auto",
        system: str | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> RowCall:
        frame = self._frame
        checked = read_options(options)
        names = names_of(out, include, checked.errors)
        wanted = unanswered(frame, names, 1, overwrite)
        read = {"template_format": template_format, "na": checked.na}
        prompts = frame_prompts(frame, column_or_template, **read)
        llm = llm or default_llm()
        least = max((NEEDS_LOGPROBS.get(name, -1) for name in include), default=-1)
        verb = Generate(
            llm,
            with_logprobs(row_params(sampling_params, llm, len(frame)), least),
            chat=chat,
            system=system,
            examples=example_pairs(examples, column_or_template, out, **read),
            keeps_tokens=checked.journal is not None,
            keeps_logprobs="logprobs" in include,
        )

        def make_frame(rows: RowJob) -> pd.DataFrame:
            columns = {out: text_column(rows.results, frame.index)}
            if checked.errors == "column":
                columns[f"{out}_error"] = error_column(rows, frame.index)
            columns |= included(rows.results, frame.index, out, include)
            answered = with_columns(frame, columns, rows)
            return exploded(answered, out, include) if explode else answered

        described = dict(
            options,
            column_or_template=column_or_template,
            sampling_params=sampling_params,
            out=out,
            include=list(include),
            explode=explode,
            template_format=template_format,
            examples=examples,
            chat=chat,
            system=system,
            overwrite=overwrite,
        )
        description = JobDescription(
            "generate", arguments_as_json(described), frame, len(frame), llm
        )
        return RowCall(verb, prompts, checked, make_frame, wanted, description)


def _messages(cell: Any) -> list[Any]:
    return list(cell) if isinstance(cell, list) else [{"role": "user", "content": str(cell)}]


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
