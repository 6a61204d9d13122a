"""From a column name or a template to one prompt per row."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Sequence
from string import Formatter
from typing import Any

import pandas as pd

from nbllm.errors import InvalidRequestError


def frame_prompts(frame: pd.DataFrame, source: Hashable) -> list[Any]:
    """One prompt per row of a frame; None where a value that it needs is missing.

    Args:
        frame: not changed.
        source: a column's name, or text with `{column}` fields (a format may follow: `{x:.2f}`;
            `{{` is a brace).

    Raises:
        InvalidRequestError: there is no such column, or it occurs twice.
    """
    if source in frame.columns:
        return [prompt_of(value) for value in _column(frame, source)]
    if not isinstance(source, str):
        raise InvalidRequestError(f"there is no column {source!r}", parameter="column_or_template")
    fields = template_fields(source)
    if not fields:
        raise InvalidRequestError(
            f"{source!r} is neither a column{_hint(source, frame.columns)} nor a template with "
            "{column} fields",
            parameter="column_or_template",
        )
    columns = {name: _column(frame, name) for name in fields}
    rows = zip(*columns.values(), strict=True)
    return [_fill(source, dict(zip(columns, row, strict=True))) for row in rows]


def series_prompts(series: pd.Series[Any], template: str | None) -> list[Any]:
    """One prompt per value; the template's field is `{}`, or the series' name.

    Raises:
        InvalidRequestError: the template has another field, or none.
    """
    if template is None:
        return [prompt_of(value) for value in series.tolist()]
    allowed = {"", str(series.name)}
    fields = template_fields(template)
    if not fields or not set(fields) <= allowed:
        raise InvalidRequestError(
            f"the template of a Series has one field, {{}} or {{{series.name}}}: {template!r}",
            parameter="template",
        )
    return [_fill(template, dict.fromkeys(fields, value)) for value in series.tolist()]


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
    """A cell as a prompt: text, token ids, a prompt dict or messages; None if it is missing."""
    if is_missing(value):
        return None
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


def _fill(template: str, values: dict[str, Any]) -> str | Exception | None:
    """The template with one row's values; the error if a format does not suit a value."""
    if any(is_missing(value) for value in values.values()):
        return None
    try:
        return "".join(_pieces(template, values))
    except (ValueError, TypeError) as error:
        return InvalidRequestError(f"the template does not suit this row: {error}")


def _pieces(template: str, values: dict[str, Any]) -> Iterator[str]:
    """Field names are taken as they are: no attribute or index of a value can be reached."""
    formatter = Formatter()
    for text, name, spec, conversion in formatter.parse(template):
        yield text
        if name is not None:
            value = formatter.convert_field(values[name], conversion)
            yield format(value, spec or "")


def _hint(name: Hashable, columns: Sequence[Any] | pd.Index[Any]) -> str:
    close = difflib.get_close_matches(str(name), [str(column) for column in columns], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
