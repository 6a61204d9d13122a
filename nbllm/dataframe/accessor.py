"""The `.llm` accessors of DataFrame and Series.

    df.llm.generate("question", out="answer")
    df.llm.generate("Translate to French: {text}", SamplingParams(temperature=0), out="french")

The rows go through the `LLM`: one continuous batch with every other caller. A row that
fails has a missing answer and its error, and the others are not affected.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from contextlib import closing
from typing import Any

import pandas as pd

import nbllm
from nbllm.dataframe.prompts import frame_prompts, is_conversation, series_prompts
from nbllm.default_llm import default_llm
from nbllm.errors import Interrupted, InvalidRequestError
from nbllm.inputs import EncodedPrompt
from nbllm.llm import LLM
from nbllm.outputs import RequestOutput
from nbllm.progress import ProgressBar, progress_bar
from nbllm.sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None


def register() -> None:
    """Give DataFrame and Series their `.llm`. Idempotent."""
    for owner, accessor in ((pd.DataFrame, DataFrameAccessor), (pd.Series, SeriesAccessor)):
        if getattr(owner, "llm", None) is not accessor:
            getattr(pd.api.extensions, f"register_{owner.__name__.lower()}_accessor")("llm")(
                accessor
            )


class DataFrameAccessor:
    """`df.llm`: see `generate`."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def generate(
        self,
        column_or_template: Hashable,
        sampling_params: Params = None,
        *,
        llm: LLM | None = None,
        out: Hashable = "llm",
        na: str = "skip",
        errors: str = "column",
        overwrite: bool = False,
        chat: bool | str = "auto",
        system: str | None = None,
        use_tqdm: Any = True,
        on_interrupt: str = "raise",
    ) -> pd.DataFrame:
        """Answer every row; returns a new frame with the answers in column `out`.

        Args:
            column_or_template: a column's name, or text with `{column}` fields. A cell may also
                hold token ids, or a list of messages.
            sampling_params: one for all rows, or one each; None is what the model recommends.
            llm: default: that of `nbllm.set_default_llm`, else the `LLM` made last, else the
                bundled demo model.
            out: name of the new column; a text per row, or with `n > 1` a list of texts.
            na: "skip" leaves rows with missing values unanswered; "raise" refuses them.
            errors: "column" puts why a row failed into `<out>_error` (missing where it did not);
                "warn" only warns; "raise" raises the first error, with the frame in `nbllm.last`.
            overwrite: if `out` exists, answer again those rows that have no answer, and keep the
                others; without it an existing column is an error.
            chat: True sends the prompt as a user's message through the chat template, False as
                it is; "auto" does the first if the model has a template.
            system: a system message for every row (implies chat).
            use_tqdm: show progress; or a callable that makes a tqdm-like bar.
            on_interrupt: "raise" raises `Interrupted`, whose `.partial` is the frame so far, also
                in `nbllm.last`; "return" returns it, with "interrupted" as the error of the rest.

        Raises:
            InvalidRequestError: an argument is wrong; `.parameter` names it.
            Interrupted: Ctrl-C; the engine and its other callers go on.
        """
        frame = self._frame
        error_column = f"{out}_error"
        _check_choices(na, errors, on_interrupt, chat)
        taken = [c for c in (out, error_column) if c in frame.columns]
        if taken and not overwrite:
            raise InvalidRequestError(
                f"column {taken[0]!r} exists; choose another name with out=, or pass "
                "overwrite=True to answer the rows that have no answer yet",
                parameter="out",
            )
        prompts = frame_prompts(frame, column_or_template)
        known: list[Any] = [None] * len(prompts)
        if overwrite and out in frame.columns:
            known = [None if missing else value for value, missing in _values(frame, out)]
        job = _Job(llm or default_llm(), prompts, sampling_params, known, chat, system)
        if na == "raise" and job.num_missing:
            raise InvalidRequestError(f"{job.num_missing} rows have missing values", parameter="na")

        def result() -> pd.DataFrame:
            answered = frame.copy()
            answered[out] = _text_array(job.answers, frame.index)
            if errors == "column":
                answered[error_column] = _text_array(job.error_texts(), frame.index)
            return answered

        return _run(job, result, errors, on_interrupt, use_tqdm)


class SeriesAccessor:
    """`series.llm`: see `generate`."""

    def __init__(self, series: pd.Series[Any]) -> None:
        self._series = series

    def generate(
        self,
        template: str | None = None,
        sampling_params: Params = None,
        *,
        llm: LLM | None = None,
        out: Hashable = None,
        na: str = "skip",
        errors: str = "warn",
        chat: bool | str = "auto",
        system: str | None = None,
        use_tqdm: Any = True,
        on_interrupt: str = "raise",
    ) -> pd.Series[Any]:
        """Answer every value; returns a Series of answers with the same index.

        Args:
            template: text with the field `{}`; None takes the values as prompts.
            out: name of the result; default: that of the series.
            errors: "warn" leaves a missing answer and warns; "raise" raises the first error.

        The other arguments and errors are those of the DataFrame's `generate`.
        """
        series = self._series
        _check_choices(na, errors, on_interrupt, chat)
        if errors == "column":
            raise InvalidRequestError(
                "a Series has no column for errors: use errors='warn', or the DataFrame's accessor",
                parameter="errors",
            )
        prompts = series_prompts(series, template)
        known = [None] * len(prompts)
        job = _Job(llm or default_llm(), prompts, sampling_params, known, chat, system)
        if na == "raise" and job.num_missing:
            raise InvalidRequestError(f"{job.num_missing} values are missing", parameter="na")

        def result() -> pd.Series[Any]:
            answers = _text_array(job.answers, series.index)
            answers.name = series.name if out is None else out
            return answers

        return _run(job, result, errors, on_interrupt, use_tqdm)


class _Job:
    """The rows of one call, by position.

    Attributes:
        answers: a text, a list of texts, or None.
        rows: positions of the rows that are answered, in the order in which the engine gets them.
        errors: why a row has no answer, by position.
        num_missing: rows whose values are missing.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: list[Any],
        params: Params,
        known: list[Any],
        chat: bool | str,
        system: str | None,
    ) -> None:
        self.llm = llm
        self.answers = known
        self.errors: dict[int, BaseException] = {}
        self.num_missing = sum(prompt is None for prompt in prompts)
        self.rows = [
            row for row, prompt in enumerate(prompts) if prompt is not None and known[row] is None
        ]
        # What begins alike is computed together, wherever it stands in the frame.
        self.rows.sort(key=lambda row: prompts[row] if isinstance(prompts[row], str) else "")
        self._prompts = prompts
        self._system = system
        if chat == "auto":
            tokenizer = llm._tokenizer
            chat = tokenizer is not None and bool(llm.chat_template or tokenizer.chat_template)
        self._chat = bool(chat) or system is not None
        self._params: Any = params
        if params is not None and not isinstance(params, SamplingParams):
            if len(params) != len(prompts):
                raise InvalidRequestError(
                    f"sampling_params has {len(params)} entries for {len(prompts)} rows",
                    parameter="sampling_params",
                )
            self._params = [params[row] for row in self.rows]

    def run(self, bar: ProgressBar) -> None:
        """Fill `answers` and `errors`."""
        prompts = (self._render(self._prompts[row]) for row in self.rows)
        with self.llm._call(self.llm._rows(prompts, self._params, None)) as call:
            call.run(self._keep, bar)

    def error_texts(self) -> list[str | None]:
        """One per row, None where nothing went wrong."""
        errors = self.errors
        return [str(errors[row]) if row in errors else None for row in range(len(self.answers))]

    def mark_unfinished(self) -> None:
        """What an interrupt leaves behind."""
        for row in self.rows:
            if self.answers[row] is None and row not in self.errors:
                self.errors[row] = Interrupted()

    def _keep(self, number: int, output: RequestOutput) -> None:
        row = self.rows[number]
        if output.error is not None:
            self.errors[row] = output.error
        else:
            texts = [completion.text for completion in output.outputs]
            self.answers[row] = texts[0] if len(texts) == 1 else texts

    def _render(self, prompt: Any) -> Any:
        if isinstance(prompt, InvalidRequestError):
            return EncodedPrompt(None, [], prompt)
        messages = prompt if is_conversation(prompt) else None
        if messages is None and self._chat and isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        if messages is None:
            return prompt
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        try:
            return self.llm.render_chat(messages)
        except InvalidRequestError as error:
            return EncodedPrompt(None, [], error)


def _run(job: _Job, result: Any, errors: str, on_interrupt: str, use_tqdm: Any) -> Any:
    """Run a job to its end, or to the interrupt; `result()` makes what is returned."""
    try:
        with closing(
            progress_bar(len(job.rows), "Generating", enabled=use_tqdm, unit="row")
        ) as bar:
            job.run(bar)
    except KeyboardInterrupt:
        job.mark_unfinished()
        nbllm.last = result()
        if on_interrupt == "raise":
            raise Interrupted(partial=nbllm.last) from None
        return nbllm.last
    if job.errors and errors != "column":
        first = next(iter(job.errors.values()))
        if errors == "raise":
            nbllm.last = result()
            raise first
        warnings.warn(
            f"{len(job.errors)} of {len(job.rows)} rows failed; the first: {first}", stacklevel=3
        )
    return result()


def _text_array(values: list[Any], index: pd.Index[Any]) -> pd.Series[Any]:
    """A column of texts (missing: pandas.NA), or of lists of texts."""
    if any(isinstance(value, list) for value in values):
        return pd.Series(pd.array([*values, None], dtype=object)[:-1], index=index)
    return pd.Series(pd.array(values, dtype="string"), index=index)


def _values(frame: pd.DataFrame, column: Hashable) -> list[tuple[Any, bool]]:
    values = frame[column]
    missing = [not isinstance(value, list) and bool(pd.isna(value)) for value in values]
    return list(zip(values.tolist(), missing, strict=True))


def _check_choices(na: str, errors: str, on_interrupt: str, chat: bool | str) -> None:
    for parameter, value, allowed in (
        ("na", na, ("skip", "raise")),
        ("errors", errors, ("column", "warn", "raise")),
        ("on_interrupt", on_interrupt, ("raise", "return")),
        ("chat", chat, (True, False, "auto")),
    ):
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise InvalidRequestError(
                f"{parameter} must be one of {choices}, got {value!r}", parameter=parameter
            )
