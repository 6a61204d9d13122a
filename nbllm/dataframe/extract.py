"""Extract: typed columns out of texts, held to a schema token by token.

class Person(BaseModel):
    name: str
    city: str | None

df.llm.extract("mail", Person)      # the columns name and city, of dtype string
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from nbllm.dataframe.columns import NEEDS_LOGPROBS, included, names_of, text_column
from nbllm.dataframe.frame_verbs import FrameVerbs, error_column, read_options
from nbllm.dataframe.generate_verb import Generate, Params, cut_error, row_params, with_logprobs
from nbllm.dataframe.journal import RowResult
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.dataframe.schemas import Check, Field, parse, read_schema, schema_fields
from nbllm.dataframe.sources import FrameSource, SeriesSource, Source, unanswered, with_columns
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError, RequestFailedError
from nbllm.llm import LLM
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import SamplingParams, StructuredOutputsParams


class Extract(Generate):
    """A JSON document for each row, in `RowResult.texts`.

    Args:
        llm, params_of, chat, system, keeps_tokens: as in `Generate`.
        fields: the columns that it must fit.
        check: what else it must fit.
        instruction: stands before each prompt that is text.
    """

    def __init__(
        self,
        llm: LLM,
        params_of: Callable[[int], SamplingParams],
        *,
        fields: Sequence[Field],
        check: Check | None,
        instruction: str,
        **options: Any,
    ) -> None:
        super().__init__(llm, params_of, **options)
        self._fields = fields
        self._check = check
        self._instruction = f"{instruction}\n\n" if instruction else ""

    def render(self, prompt: Any) -> Any:
        return super().render(self._instruction + prompt if isinstance(prompt, str) else prompt)

    def result(self, outputs: list[RequestOutput], row: int) -> RowResult | Exception:
        completion = outputs[0].outputs[0]
        if completion.finish_reason != "stop":
            return cut_error(completion)
        try:
            parse(completion.text, self._fields)
            if self._check is not None:
                self._check(completion.text)
        except ValueError as error:
            return RequestFailedError(f"the JSON does not fit: {error}", parameter="schema")
        return super().result(outputs, row)


class ExtractVerbs(FrameVerbs):
    """`df.llm.extract`."""

    def extract(
        self, column_or_template: Any, schema: Any, *, job: bool = False, **options: Any
    ) -> Any:
        """Columns out of the text of every row; returns a new frame with them.

        The engine lets only such tokens through as the schema allows, so every row is valid. One
        that is cut, by `max_tokens` or the model's context, is an error of that row.

        Args:
            column_or_template: as in `generate`.
            schema: a pydantic model, a dataclass or a TypedDict; a dict of types by field; or a
                JSON schema as a dict. Columns have real dtypes: Literal and Enum are categorical
                with all categories, int is Int64, float Float64, bool boolean, str string,
                datetime datetime64[ns, UTC], date an object column of dates; the fields of nested
                models are columns with a dot, and lists and unions are objects.

        Keyword args:
            sampling_params: as in `generate`; default: greedy.
            instruction: put before each text. None (the default) asks for what the schema names;
                "" is nothing.
            prefix: put before the name of each new column, default "".
            out: what other columns' names begin with, default "extract": `<out>_error`, and those
                of `include`.
            include: as in `generate`, and "json": the text of each document.
            job: True returns at once with the `FrameJob` that `submit` returns.
            overwrite: if the columns exist, answer again the rows where all of them are missing,
                and keep the others.
            chat, system, template_format, llm, na, errors, max_errors, dedupe, order, journal,
                use_tqdm, on_interrupt: as in `generate`. `nbllm.resume` knows the JSON schema of a
                class, but not its validators.

        Raises:
            InvalidRequestError, Interrupted, JournalError, RequestFailedError: as `generate`.
        """
        return self._extract(column_or_template, schema, **options).answer(job)

    async def aextract(self, column_or_template: Any, schema: Any, **options: Any) -> pd.DataFrame:
        """`extract` for any event loop; cancelling the task stops the rows."""
        result: pd.DataFrame = await self._extract(column_or_template, schema, **options).submit()
        return result

    def _extract(self, column_or_template: Any, schema: Any, **options: Any) -> RowCall:
        return _extract_call(FrameSource(self._frame, column_or_template), schema, **options)


class ExtractSeriesVerbs:
    """`series.llm.extract`."""

    _series: pd.Series[Any]

    def extract(
        self, schema: Any, *, template: Any = None, job: bool = False, **options: Any
    ) -> Any:
        """Columns out of every value; returns a frame with the index of the series.

        Args:
            schema: as in the DataFrame's `extract`, and so are the columns.
            template: text with the field `{}`, or a function; None takes the values as prompts.

        Keyword args:
            errors: "warn" (the default), "raise", or "column".

        The other arguments and errors are those of the DataFrame's `extract`.
        """
        source = SeriesSource(self._series, template)
        return _extract_call(source, schema, **options).answer(job)

    async def aextract(self, schema: Any, *, template: Any = None, **options: Any) -> pd.DataFrame:
        """`extract` for any event loop; cancelling the task stops the rows."""
        source = SeriesSource(self._series, template)
        result: pd.DataFrame = await _extract_call(source, schema, **options).submit()
        return result


def _extract_call(
    source: Source,
    schema: Any,
    *,
    sampling_params: Params = None,
    instruction: str | None = None,
    prefix: str = "",
    out: Hashable = "extract",
    include: Sequence[str] = (),
    overwrite: bool = False,
    llm: LLM | None = None,
    chat: bool | str = "auto",
    system: str | None = None,
    template_format: str = "f-string",
    **options: Any,
) -> RowCall:
    checked = read_options(options, label="Extracting", errors=source.default_errors)
    others = [name for name in include if name != "json"]
    json_schema, check = read_schema(schema)
    fields = schema_fields(json_schema)
    prompts = source.prompts(template_format=template_format, na=checked.na)
    llm = llm or default_llm()
    params_of = _constrained(sampling_params, json_schema, llm, len(prompts))
    least = max((NEEDS_LOGPROBS.get(name, -1) for name in others), default=-1)
    verb = Extract(
        llm,
        with_logprobs(params_of, least),
        fields=fields,
        check=check,
        instruction=_instruction(json_schema, fields) if instruction is None else instruction,
        chat=chat,
        system=system,
        keeps_tokens=checked.journal is not None,
        keeps_logprobs="logprobs" in others,
    )
    index = source.base.index

    def make_frame(rows: RowJob) -> pd.DataFrame:
        columns = _columns(rows, fields, prefix, index)
        if "json" in include:
            columns[f"{out}_json"] = text_column(rows.results, index)
        if checked.errors == "column":
            columns[f"{out}_error"] = error_column(rows, index)
        columns |= included(rows.results, index, out, others)
        return with_columns(source.base, columns, rows)

    described = {
        "schema": json_schema,
        "sampling_params": sampling_params,
        "instruction": instruction,
        "prefix": prefix,
        "out": out,
        "include": list(include),
        "overwrite": overwrite,
        "chat": chat,
        "system": system,
        "template_format": template_format,
        **options,
    }
    description = source.description("extract", described, llm)
    names: list[Hashable] = [f"{prefix}{field.name}" for field in fields]
    taken = [name for name in names if name in source.base.columns]
    if taken and not overwrite:
        raise InvalidRequestError(
            f"column {taken[0]!r} exists; rename the new ones with prefix=, or pass overwrite=True "
            "to answer the rows that have no answer yet",
            parameter="prefix",
        )
    names += [*names_of(out, others, checked.errors)[1:], *[f"{out}_json"] * ("json" in include)]
    wanted = unanswered(source.base, names, len(fields), overwrite)
    if wanted is not None:  # columns that can't be filled are found before rows are computed
        make_frame(RowJob(verb, prompts, rows=[]))
    return RowCall(verb, prompts, checked, make_frame, wanted, description)


def _constrained(
    params: Params, schema: dict[str, Any], llm: LLM, num_rows: int
) -> Callable[[int], SamplingParams]:
    """`row_params`, greedy unless they say otherwise, held to a schema."""
    if params is None:
        params = SamplingParams(temperature=0.0)
    elif isinstance(params, Mapping):
        params = {"temperature": 0.0, **params}
    params_of = row_params(params, llm, num_rows)
    for each in params if isinstance(params, Sequence) else [params_of(0)] if num_rows else []:
        _check_free(each)
    form = StructuredOutputsParams(json=schema)
    try:
        llm.prepare(SamplingParams(structured_outputs=form))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"schema: {error}", parameter="schema") from error
    last: list[SamplingParams] = []  # what was asked for, and what was made of it

    def constrained(row: int) -> SamplingParams:
        asked = params_of(row)
        if not last or last[0] is not asked:
            last[:] = asked, asked.clone(structured_outputs=form)
        return last[1]

    return constrained


def _check_free(params: SamplingParams) -> None:
    if params.n != 1 or params.structured_outputs is not None:
        raise InvalidRequestError(
            "sampling_params of extract must leave n and structured_outputs alone",
            parameter="sampling_params",
        )


def _columns(
    rows: RowJob, fields: Sequence[Field], prefix: str, index: pd.Index[Any]
) -> dict[Hashable, pd.Series[Any]]:
    nothing = [None] * len(fields)
    cells = [nothing if r is None else parse(r.texts[0], fields) for r in rows.results]
    return {
        f"{prefix}{field.name}": field.column([row[place] for row in cells], index)
        for place, field in enumerate(fields)
    }


def _instruction(schema: dict[str, Any], fields: Sequence[Field]) -> str:
    """Asks for names, where these say everything, else shows the schema."""
    if all(field.dtype == "string" and len(field.path) == 1 for field in fields):
        if "description" not in json.dumps(schema):
            *before, last = [field.name for field in fields]
            names = f"{', '.join(before)} and {last}" if before else last
            return f"Extract {names} from the text, as JSON."
    shown = json.dumps(schema, ensure_ascii=False)
    return f"Extract what this JSON schema describes from the text, as JSON: {shown}"
