"""From a frame and a template to one prompt per row, made when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterator, Sequence
from string import Formatter
from typing import Any

import pandas as pd

from nbllm.dataframe.call_options import check_choice
from nbllm.errors import InvalidRequestError

_FORMATS = ("f-string", "jinja2")
Message = dict[str, Any]


class Prompts(Sequence[Any]):
    """The prompts of a frame's rows, by position: text, token ids, a prompt dict or messages; None
    where a value is missing, and the error where the template does not suit a value.

    Args:
        columns: values by name, all of the same length.
        num_rows: how many.
        render: (values of a row by name) -> prompt.
        keeps_missing: missing values reach `render` as empty texts.
        names_columns: False if a function gets `columns`, and nobody knows which it reads.
    """

    def __init__(
        self,
        columns: dict[Hashable, list[Any]],
        num_rows: int,
        render: Callable[[dict[Hashable, Any]], Any],
        *,
        keeps_missing: bool = False,
        names_columns: bool = True,
    ) -> None:
        self._columns = columns
        self._num_rows = num_rows
        self._render = render
        self._keeps_missing = keeps_missing
        self._names_columns = names_columns

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: Any) -> Any:
        values = {name: column[row] for name, column in self._columns.items()}
        missing = [name for name, value in values.items() if is_missing(value)]
        if missing:
            if not self._keeps_missing:
                return None
            values |= dict.fromkeys(missing, "")
        try:
            return self._render(values)
        except InvalidRequestError as error:
            return error
        except Exception as error:  # the user's template, or function
            return InvalidRequestError(f"the template does not suit this row: {error}")

    def num_missing(self) -> dict[Hashable, int]:
        """How many values are missing in each column that the template names."""
        columns = self._columns if self._names_columns else {}
        return {name: sum(map(is_missing, column)) for name, column in columns.items()}

    def missing(self) -> list[bool]:
        """Which rows have a value missing."""
        flags = [False] * self._num_rows
        if not self._keeps_missing:
            for column in self._columns.values():
                flags = [flag or is_missing(value) for flag, value in zip(flags, column)]  # noqa: B905
        return flags


def frame_prompts(
    frame: pd.DataFrame, source: Any, *, template_format: str = "f-string", na: str = "skip"
) -> Prompts:
    """The prompts of a frame's rows.

    Args:
        frame: not changed.
        source: a column's name; text with `{column}` fields (a format may follow: `{x:.2f}`; `{{`
            is a brace), or a Jinja template with `template_format="jinja2"`; a `jinja2.Template`;
            or a function from a row, a dict by column, to a prompt.
        template_format: how text is read.
        na: "fill" makes empty texts of missing values; else rows with one have no prompt.

    Raises:
        InvalidRequestError: there is no such column, or it occurs twice, or no such format.
    """
    check_choice("template_format", template_format, _FORMATS)
    keeps_missing = na == "fill"

    def prompts(names: Sequence[Hashable], render: Callable[[dict[Hashable, Any]], Any]) -> Prompts:
        columns = {name: _column(frame, name) for name in names}
        return Prompts(columns, len(frame), render, keeps_missing=keeps_missing)

    if isinstance(source, Hashable) and source in frame.columns:
        return prompts([source], lambda values: prompt_of(values[source]))
    if callable(source):
        return _of_all_columns(frame, source)
    if hasattr(source, "render"):
        return _of_all_columns(frame, _jinja_renderer(source))
    if not isinstance(source, str):
        raise InvalidRequestError(f"there is no column {source!r}", parameter="column_or_template")
    if template_format == "jinja2":
        template, names = _compile_jinja(source)
        return prompts(names, _jinja_renderer(template))
    fields = template_fields(source)
    if not fields:
        raise InvalidRequestError(
            f"{source!r} is neither a column{_hint(source, frame.columns)} nor a template with "
            "{column} fields",
            parameter="column_or_template",
        )
    return prompts(fields, lambda values: "".join(_pieces(source, values)))


def series_prompts(
    series: pd.Series[Any], template: Any, *, template_format: str = "f-string", na: str = "skip"
) -> Prompts:
    """The prompts of a series' values; the template's field is `{}`, or the series' name.

    Raises:
        InvalidRequestError: the template has another field, or none; there is no such format.
    """
    check_choice("template_format", template_format, _FORMATS)
    name = "" if series.name is None else str(series.name)
    values: list[Any] = series.tolist()

    def prompts(fields: Sequence[str], render: Callable[[dict[Hashable, Any]], Any]) -> Prompts:
        columns: dict[Hashable, list[Any]] = dict.fromkeys(fields, values)
        return Prompts(columns, len(values), render, keeps_missing=na == "fill")

    if template is None:
        return prompts([""], lambda row: prompt_of(row[""]))
    if callable(template):
        return prompts([""], lambda row: template(row[""]))
    if template_format == "jinja2" and isinstance(template, str):
        compiled, fields = _compile_jinja(template)
        if set(fields) <= {"value", name}:
            return prompts(fields, _jinja_renderer(compiled))
    else:
        fields = template_fields(template)
        if fields and set(fields) <= {"", name}:
            return prompts(fields, lambda row: "".join(_pieces(template, row)))
    raise InvalidRequestError(
        f"the template of a Series has one field, {{}} or {{{series.name}}} (in Jinja, value): "
        f"{template!r}",
        parameter="template",
    )


def template_fields(template: str) -> list[str]:
    """The names of a template's fields, each once.

    Raises:
        InvalidRequestError: the braces do not match.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InvalidRequestError(
            f"{template!r} is no template: {error}", parameter="column_or_template"
        ) from error
    return list(dict.fromkeys(names))


def prompt_of(value: Any) -> Any:
    """A cell as a prompt: text, token ids, a prompt dict or messages."""
    return value if isinstance(value, (str, list, dict)) else str(value)


def is_missing(value: Any) -> bool:
    """True for None, NaN, NaT and pandas.NA."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def is_conversation(prompt: Any) -> bool:
    """True for a list of `{"role": ..., "content": ...}` messages."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _column(frame: pd.DataFrame, name: Hashable) -> list[Any]:
    if name not in frame.columns:
        raise InvalidRequestError(
            f"there is no column {name!r}{_hint(name, frame.columns)}",
            parameter="column_or_template",
        )
    column = frame[name]
    if isinstance(column, pd.DataFrame):
        raise InvalidRequestError(
            f"column {name!r} occurs {column.shape[1]} times", parameter="column_or_template"
        )
    return list(column.tolist())


def _of_all_columns(frame: pd.DataFrame, render: Callable[[dict[Hashable, Any]], Any]) -> Prompts:
    columns: dict[Hashable, list[Any]] = {name: _column(frame, name) for name in frame.columns}
    return Prompts(columns, len(frame), render, keeps_missing=True, names_columns=False)


def _pieces(template: str, values: dict[Hashable, Any]) -> Iterator[str]:
    """Field names are taken as they are: no attribute or index of a value can be reached."""
    formatter = Formatter()
    for text, name, spec, conversion in formatter.parse(template):
        yield text
        if name is not None:
            value = formatter.convert_field(values[name], conversion)
            yield format(value, spec or "")


def _compile_jinja(template: str) -> tuple[Any, list[str]]:
    """A template, and the columns that it names."""
    import jinja2
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        names = sorted(meta.find_undeclared_variables(environment.parse(template)))
        return environment.from_string(template), names
    except jinja2.TemplateError as error:
        raise InvalidRequestError(
            f"{template!r} is no Jinja template: {error}", parameter="column_or_template"
        ) from error


def _jinja_renderer(template: Any) -> Callable[[dict[Hashable, Any]], Any]:
    return lambda values: template.render({str(name): value for name, value in values.items()})


def _hint(name: Hashable, columns: Sequence[Any] | pd.Index[Any]) -> str:
    close = difflib.get_close_matches(str(name), [str(column) for column in columns], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
