"""Rendering chat templates: Jinja from a model's folder, sandboxed and bounded.

Templates come with models, so they are as trustworthy as a download. The sandbox keeps them from
Python's internals; it does not bound time or memory, so output, loops, multiplications and the
wall clock are bounded here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from nbllm.errors import InvalidRequestError

_MAX_CHARS = 10_000_000
_MAX_SECONDS = 1.5
_MAX_RANGE = 100_000


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Text of a conversation, as `transformers` renders it.

    Raises:
        InvalidRequestError: the template is no valid Jinja, refuses the conversation, or takes
            too long or too much.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            parameter="continue_final_message",
        )
    _check_messages(messages)
    from jinja2 import TemplateError

    deadline = time.monotonic() + _MAX_SECONDS
    context = dict(variables or {}) | {
        "messages": [dict(message) for message in messages],
        "tools": [dict(tool) for tool in tools] if tools is not None else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "range": lambda *bounds: _bounded_range(deadline, *bounds),
    }
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in _compile(template).generate(**context):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > _MAX_CHARS:
                raise OverflowError(f"more than {_MAX_CHARS} characters")
            if time.monotonic() > deadline:
                raise TimeoutError(f"more than {_MAX_SECONDS} seconds")
    except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise _failure(error) from error
    except (LookupError, AttributeError, RecursionError, OSError, MemoryError) as error:
        raise _failure(error) from error
    text = "".join(pieces)
    return _cut_after_last_message(text, messages) if continue_final_message else text


def _failure(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(
        f"the chat template fails on this conversation: {error}", parameter="messages"
    )


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InvalidRequestError("messages must not be empty", parameter="messages")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise InvalidRequestError(
                f"a message must be a dict with 'role' and 'content', got {message!r:.200}",
                parameter="messages",
            )


def _cut_after_last_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1].get("content")
    last = content.strip() if isinstance(content, str) else ""
    position = text.rfind(last) if last else -1
    if position < 0:
        raise InvalidRequestError(
            "continue_final_message: the template does not show the last message's text",
            parameter="continue_final_message",
        )
    return text[: position + len(last)]


@lru_cache(maxsize=32)
def _compile(template: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses attribute tricks (Jinja's sandbox) and huge products."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise OverflowError("powers are not allowed in chat templates")
            for value, count in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                    if len(value) * count > _MAX_RANGE:
                        raise OverflowError("a repetition is too long")
            return super().call_binop(context, operator, left, right)

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's tokens for training; here it changes nothing."""

        tags = frozenset(["generation"])  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=lineno)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.pop("lipsum", None)  # an unbounded text generator
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise InvalidRequestError(
            f"the chat template is not valid: {error}", parameter="chat_template"
        ) from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _bounded_range(deadline: float, *bounds: int) -> Iterator[int]:
    numbers = range(*bounds)
    if len(numbers) > _MAX_RANGE:
        raise OverflowError(f"a range of {len(numbers)}")

    def count() -> Iterator[int]:
        # A loop that prints nothing never returns to the caller's clock, so it has its own.
        for number in numbers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"more than {_MAX_SECONDS} seconds")
            yield number

    return count()
