"""`response_format` (OpenAI) and `structured_outputs` (vLLM) -> `StructuredOutputsParams`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from nbllm.errors import InvalidRequestError
from nbllm.sampling_params import StructuredOutputsParams

MAX_SCHEMA_CHARS = 64 << 10  # of a schema or a grammar
MAX_REGEX_CHARS = 4 << 10
MAX_CHOICES = 1024

_NAMES = frozenset(field.name for field in fields(StructuredOutputsParams))
_BOOLS = ("json_object", "disable_any_whitespace", "disable_additional_properties")
_LENGTHS = {
    "regex": MAX_REGEX_CHARS,
    "grammar": MAX_SCHEMA_CHARS,
    "structural_tag": MAX_SCHEMA_CHARS,
    "whitespace_pattern": MAX_REGEX_CHARS,
}


class JsonSchemaFormat(BaseModel):
    """A named schema; `strict` makes no difference, a schema is always enforced."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class JsonFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


def structured_outputs_params(
    response_format: JsonFormat | None, structured_outputs: dict[str, Any] | None
) -> StructuredOutputsParams | None:
    """What the text must be like; None is anything.

    Raises:
        InvalidRequestError: both are given, one has a wrong form, or it is too large.
    """
    if response_format is not None and response_format.type != "text":
        if structured_outputs is not None:
            _fail("structured_outputs", "and response_format exclude each other")
        return _from_response_format(response_format)
    return None if structured_outputs is None else _from_structured_outputs(structured_outputs)


def _from_response_format(response_format: JsonFormat) -> StructuredOutputsParams:
    if response_format.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    schema = response_format.json_schema
    if schema is None or schema.json_schema is None:
        _fail("response_format", "of type json_schema needs json_schema.schema")
    _check_schema("response_format", schema.json_schema)
    return StructuredOutputsParams(json=schema.json_schema)


def _from_structured_outputs(given: dict[str, Any]) -> StructuredOutputsParams:
    values = {name: value for name, value in given.items() if value is not None}
    if not values.keys() <= _NAMES:
        _fail("structured_outputs", f"may hold {', '.join(sorted(_NAMES))}")
    for name, most in _LENGTHS.items():
        value = values.get(name, "")
        if not isinstance(value, str) or len(value) > most:
            _fail("structured_outputs", f"{name} must be a string of at most {most} characters")
    for name in _BOOLS:
        if not isinstance(values.get(name, False), bool):
            _fail("structured_outputs", f"{name} must be true or false")
    if "json" in values:
        _check_schema("structured_outputs", values["json"])
    choice = values.get("choice", [])
    if not isinstance(choice, list) or len(choice) > MAX_CHOICES:
        _fail("structured_outputs", f"choice must be a list of at most {MAX_CHOICES} strings")
    if sum(len(item) for item in choice if isinstance(item, str)) > MAX_SCHEMA_CHARS:
        _fail("structured_outputs", f"choice holds more than {MAX_SCHEMA_CHARS} characters")
    return StructuredOutputsParams(**values)


def _check_schema(parameter: str, schema: Any) -> None:
    if not isinstance(schema, (str, dict)):
        _fail(parameter, "the schema must be an object")
    text = schema if isinstance(schema, str) else json.dumps(schema)
    if len(text) > MAX_SCHEMA_CHARS:
        _fail(parameter, f"the schema is longer than {MAX_SCHEMA_CHARS} characters")


def _fail(parameter: str, rule: str) -> NoReturn:
    raise InvalidRequestError(f"{parameter}: {rule}", parameter=parameter)
