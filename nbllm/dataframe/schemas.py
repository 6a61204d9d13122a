"""Schemas: what `extract` is asked for, as a JSON schema, and as typed columns.

    class Review(BaseModel):                    rating  category  (1, 2, 3, 4, 5)
        rating: Literal[1, 2, 3, 4, 5]    ->    author.name  string
        author: Person                          author.age   Int64
        tags: list[str]                         tags    object

The columns are read off the JSON schema alone, so every way to write one gives the same frame.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import pandas as pd
import typing_extensions

from nbllm.errors import InvalidRequestError

_INT64 = range(-(2**63), 2**63)
_MISSING = object()
Check = Callable[[str], Any]
"""Raises ValueError for JSON text that does not fit."""


def read_schema(schema: Any) -> tuple[dict[str, Any], Check | None]:
    """The JSON schema of what a user gives, and a check of what it can't say.

    Args:
        schema: a pydantic model, a dataclass or a TypedDict; a dict of types by field; or a JSON
            schema as a dict. It describes an object.

    Raises:
        InvalidRequestError: it is none of these, or has types that JSON does not have.
    """
    if isinstance(schema, Mapping) and not _has_types(schema):
        return json.loads(json.dumps(schema)), None
    import pydantic

    try:
        if isinstance(schema, Mapping):
            schema = _typed_dict("Fields", dict(schema))
        elif typing_extensions.is_typeddict(schema):
            schema = _typed_dict(schema.__name__, _hints(schema))
        elif not (dataclasses.is_dataclass(schema) or hasattr(schema, "model_json_schema")):
            raise TypeError(f"got {schema!r}")
        adapter: Any = pydantic.TypeAdapter(schema)
        return adapter.json_schema(), adapter.validate_json
    except (TypeError, NameError, pydantic.errors.PydanticUserError) as error:
        raise _error(
            "must be a pydantic model, a dataclass, a TypedDict, a dict of types or a JSON schema: "
            f"{error}"
        ) from error


@dataclass(frozen=True, slots=True)
class Field:
    """A column.

    Attributes:
        path: property names, from the document down, with what a missing one is taken to be.
        dtype: of pandas; "date" is an object column of dates.
        categories: of a categorical.
    """

    path: tuple[tuple[str, Any], ...]
    dtype: str
    categories: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The property names, with dots between."""
        return ".".join(name for name, _ in self.path)

    def read(self, document: Any) -> Any:
        """The cell of a document; None where there is nothing.

        Raises:
            ValueError: the column can't hold it; names the field.
        """
        value = document
        for name, default in self.path:
            if not isinstance(value, dict):
                return None
            value = value.get(name, default)
        if value is None or value is _MISSING:
            return None
        if self.dtype == "category" and value not in self.categories:
            raise ValueError(f"{self.name}: {value!r} is none of the choices")
        try:
            return _as_cell(value, self.dtype)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self.name}: {error}") from error

    def column(self, cells: Sequence[Any], index: pd.Index[Any]) -> pd.Series[Any]:
        """Cells as a column of this dtype."""
        if self.dtype == "category":
            same = len({type(category) for category in self.categories}) == 1
            categories = pd.Index(self.categories, dtype=None if same else object)
            codes = {category: code for code, category in enumerate(self.categories)}
            array: Any = pd.Categorical.from_codes(
                [-1 if cell is None else codes[cell] for cell in cells], categories=categories
            )
        elif self.dtype in ("object", "date"):
            array = pd.array([*cells, None], dtype=object)[:-1]
        else:
            dtype: Any = self.dtype
            array = pd.array(list(cells), dtype=dtype)
        return pd.Series(array, index=index)


def schema_fields(schema: Mapping[str, Any]) -> list[Field]:
    """The columns of a JSON schema, in the order of its properties.

    Text with a format date-time is datetime64[ns, UTC], and with date an object column of dates;
    an enum is categorical; lists, unions, and objects without named properties are objects.

    Raises:
        InvalidRequestError: it is not about an object with properties, or two columns would have
            the same name.
    """
    try:
        fields = list(_fields(schema, _Reader(schema), ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise _error(f"can't be read: {error!r}") from error
    names = [field.name for field in fields]
    if not fields or fields[0].path == ():
        raise _error("must be about an object with named properties")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _error(f"two columns would be named {twice!r}")
    return fields


def parse(text: str, fields: Sequence[Field]) -> list[Any]:
    """The cells of a document, in the order of the columns.

    Raises:
        ValueError: the text is no JSON, or a column can't hold a value.
    """
    document = json.loads(text)
    return [field.read(document) for field in fields]


class _Reader:
    """Follows references."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def resolve(
        self, schema: Any, seen: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A schema without a reference, null or a single choice around it; and the references that
        led there. An empty one where it goes round in circles."""
        if not isinstance(schema, Mapping):
            return {}, seen
        reference = schema.get("$ref")
        if reference is not None:
            if reference in seen:
                return {}, seen
            target: Any = self._root
            for part in reference.removeprefix("#").strip("/").split("/"):
                target = target[part.replace("~1", "/").replace("~0", "~")] if part else target
            return self.resolve(target, (*seen, reference))
        for name in ("anyOf", "oneOf", "allOf"):
            choices = [choice for choice in schema.get(name, ()) if choice != {"type": "null"}]
            if len(choices) == 1 and "properties" not in schema:
                return self.resolve(choices[0], seen)
            if choices:
                return {}, seen
        return dict(schema), seen


def _fields(
    schema: Any,
    reader: _Reader,
    path: tuple[tuple[str, Any], ...],
    seen: tuple[str, ...] = (),
) -> Iterator[Field]:
    resolved, seen = reader.resolve(schema, seen)
    properties = resolved.get("properties")
    if not properties or _dtype(resolved) != "object":
        yield Field(path, *_column_type(resolved))
        return
    for name, part in properties.items():
        default = part.get("default", _MISSING) if isinstance(part, Mapping) else _MISSING
        yield from _fields(part, reader, (*path, (name, default)), seen)


def _column_type(schema: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is None:
        return _dtype(schema), ()
    categories = tuple(value for value in values if value is not None)
    if not all(isinstance(value, Hashable) for value in categories):
        return "object", ()
    if not categories or len(set(categories)) < len(categories):  # 1 and true are the same
        return "object", ()
    return "category", categories


def _dtype(schema: Mapping[str, Any]) -> str:
    kinds: Any = schema.get("type")
    if isinstance(kinds, list):
        kinds = [kind for kind in kinds if kind != "null"]
        kinds = kinds[0] if len(kinds) == 1 else None
    if kinds == "string":
        formats = {"date-time": "datetime64[ns, UTC]", "date": "date"}
        return formats.get(schema.get("format", ""), "string")
    return {"integer": "Int64", "number": "Float64", "boolean": "boolean"}.get(kinds, "object")


def _as_cell(value: Any, dtype: str) -> Any:
    if dtype == "Int64":
        number = int(value)
        if number != value or number not in _INT64:
            raise ValueError(f"{value} is no integer of 64 bits")
        return number
    if dtype == "Float64":
        return float(value)
    if dtype == "date":
        return date.fromisoformat(value)
    if dtype == "datetime64[ns, UTC]":
        return _timestamp(value)
    if dtype == "string":
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _timestamp(text: str) -> pd.Timestamp:
    """A point in time; without an offset it is UTC's."""
    moment = pd.Timestamp(text)
    moment = moment.tz_localize("UTC") if moment.tzinfo is None else moment.tz_convert("UTC")
    return moment.as_unit("ns")


def _has_types(schema: Mapping[Any, Any]) -> bool:
    """True for a dict of types; a JSON schema holds nothing but data."""
    try:
        json.dumps(schema)
    except (TypeError, ValueError):
        return True
    return False


def _hints(schema: Any) -> dict[str, Any]:
    """The types of a TypedDict of `typing`, which pydantic does not take before Python 3.12."""
    hints = typing_extensions.get_type_hints(schema, include_extras=True)
    either: Any = (typing_extensions.Required, typing_extensions.NotRequired)
    return {
        name: hint
        if typing_extensions.get_origin(hint) in either
        else either[name not in schema.__required_keys__][hint]
        for name, hint in hints.items()
    }


def _typed_dict(name: str, types: dict[str, Any]) -> Any:
    """The same as pydantic takes it; any text may be a name."""
    make: Any = typing_extensions.TypedDict
    return make(name, types)


def _error(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"schema: {message}", parameter="schema")
