"""StructuredOutputsParams -> a grammar as llguidance reads it.

What comes from a user is bounded here, before native code sees it: a schema that is nested too
deeply would overflow a stack there, and that would be the end of the notebook's kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nbllm.errors import InvalidRequestError
from nbllm.sampling_params import StructuredOutputsParams
from nbllm.structured.repetition import MAX_REPEATED, longest_terminal, repeated_length

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_BYTES = 4 << 10
MAX_GRAMMAR_BYTES = 64 << 10
# JSON on one line, or indented. More is right JSON, too, but a small model that may write blanks
# writes nothing else.
_WHITESPACE = r"( |\n[ \t]{0,32})"
_SHARING = frozenset({"allOf", "not", "if"})  # speak of an object of which others speak, too
_COMBINING = _SHARING | {"anyOf", "oneOf", "then", "else", "$ref"}
_OPENING = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_VALUES = frozenset({"const", "enum", "default", "examples"})  # hold no schemas
MAX_NESTED = 128  # opening brackets of a regex or grammar that are not closed yet


def grammar_text(params: StructuredOutputsParams) -> str:
    """The grammar that a text must follow; whether it is a right one is not known yet.

    Raises:
        InvalidRequestError: it is too large or nested too deeply, is no JSON where it should be, or
            is of a kind that is not understood; `.parameter` is "structured_outputs".
    """
    from llguidance import LLMatcher, grammar_from

    if params.json is not None:
        return _from_schema(_schema("json", params.json), params)
    if params.json_object is not None:
        if not params.json_object:
            raise _error("json_object must be true, or be left out")
        return _from_schema({"type": "object"}, params)
    if params.regex is not None:
        _check_text("regex", params.regex, MAX_REGEX_BYTES)
        _check_repetitions("regex", repeated_length, params.regex)
        return str(LLMatcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        text = json.dumps(params.choice)
        _check_size("choice", text, MAX_GRAMMAR_BYTES)
        return str(grammar_from("choice", text))
    if params.grammar is not None:
        _check_text("grammar", params.grammar, MAX_GRAMMAR_BYTES)
        try:
            text = str(grammar_from("grammar", params.grammar))
        except Exception as error:  # of its translation from GBNF
            raise _error(f"grammar: {error}") from error
        _check_repetitions("grammar", longest_terminal, text)
        return text
    assert params.structural_tag is not None
    return _from_tags(params.structural_tag)


def _from_schema(schema: Any, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    schema = _closed(schema)
    options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    if params.whitespace_pattern is not None:
        _check_text("whitespace_pattern", params.whitespace_pattern, MAX_REGEX_BYTES)
        _check_repetitions("whitespace_pattern", repeated_length, params.whitespace_pattern)
        options["whitespace_pattern"] = params.whitespace_pattern
    try:
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
    except ValueError as error:  # numbers and letters that other JSON readers do not have
        raise _error(f"json: {error}") from error


def _from_tags(text: str) -> str:
    """vLLM's structural tags: free text, and a schema between the tags that a trigger begins."""
    from llguidance import StructTag

    _check_size("structural_tag", text, MAX_SCHEMA_BYTES)
    described = _schema("structural_tag", text)
    try:
        tags = [
            StructTag(
                trigger=next(t for t in described["triggers"] if structure["begin"].startswith(t)),
                begin=structure["begin"],
                grammar=json.dumps(structure["schema"]),
                end=structure["end"],
            )
            for structure in described["structures"]
        ]
        return str(StructTag.to_grammar(tags, assume_special=False))
    except (KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise _error(
            "structural_tag must be JSON with 'structures' of begin, schema and end, and "
            "'triggers', one of which each begin starts with"
        ) from error


def _schema(name: str, schema: Any) -> Any:
    """A schema as Python has it, if it is small enough."""
    if isinstance(schema, str):
        _check_size(name, schema, MAX_SCHEMA_BYTES)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _error(f"{name} is no valid JSON") from error
    if not isinstance(schema, (Mapping, bool)):
        raise _error(f"{name} must be a JSON object, not {type(schema).__name__}")
    _check_schema(name, schema)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _error(f"{name} holds what JSON can't: {error}") from error
    _check_size(name, text, MAX_SCHEMA_BYTES)
    return schema


def _closed(schema: Any, *, is_part: bool = False) -> Any:
    """The same with no properties but those that it names, where it does not speak of others.

    JSON Schema allows any others. Nobody who names some wants more, and a small model would go on
    inventing them.

    Args:
        schema: or a part of one.
        is_part: others name further properties of the same object.
    """
    if isinstance(schema, list):
        return [_closed(item, is_part=is_part) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    is_part = is_part or not _COMBINING.isdisjoint(schema)
    has_properties = "properties" in schema
    closed = {
        key: value
        if key in _VALUES
        else _closed(value, is_part=key in _SHARING or (key in _COMBINING and has_properties))
        for key, value in schema.items()
    }
    if isinstance(closed.get("properties"), dict) and not is_part:
        if _OPENING.isdisjoint(closed):
            closed["additionalProperties"] = False
    return closed


def _check_schema(name: str, schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > 3 * MAX_SCHEMA_DEPTH:  # of a schema within "properties" there are two levels
            raise _error(f"{name} is nested more than {MAX_SCHEMA_DEPTH} schemas deep")
        children: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                _check_patterns(name, item)
                children += item.values()
            elif isinstance(item, (list, tuple)):
                children += item
        level = children


def _check_patterns(name: str, schema: Mapping[str, Any]) -> None:
    properties = schema.get("patternProperties")
    patterns = list(properties) if isinstance(properties, Mapping) else []
    for pattern in [*patterns, schema.get("pattern")]:
        if isinstance(pattern, str):
            _check_repetitions(f"{name}: pattern", repeated_length, pattern)


def _check_repetitions(name: str, measure: Callable[[str], int], text: str) -> None:
    if measure(text) > MAX_REPEATED:
        raise _error(f"{name} repeats its parts to more than {MAX_REPEATED} letters")


def _check_text(name: str, text: Any, limit: int) -> None:
    if not isinstance(text, str):
        raise _error(f"{name} must be a string, not {type(text).__name__}")
    _check_size(name, text, limit)
    depth = 0
    for letter in text:
        if letter in "([{":
            depth += 1
            if depth > MAX_NESTED:
                raise _error(f"{name} opens more than {MAX_NESTED} brackets one in another")
        elif letter in ")]}":
            depth = max(depth - 1, 0)


def _check_size(name: str, text: str, limit: int) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limit:
        raise _error(f"{name} has {size} bytes, at most {limit}")


def _error(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs: {message}", parameter="structured_outputs")
