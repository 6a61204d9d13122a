"""Rendering chat templates: Jinja from a model's folder, in the bounds of `template_sandbox`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from functools import lru_cache
from typing import Any

from nbllm.errors import InvalidRequestError

_MAX_CHARS = 10_000_000
_MAX_TEMPLATE_CHARS = 1_000_000
_MAX_SECONDS = 1.5
_END_MARK = "NBLLM_CONTINUES_HERE "  # the space tells whether the template trims
_RESERVED = frozenset(
    [
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
    ]
)


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
    reserved = _RESERVED.intersection(variables or ())
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}",
            parameter="chat_template_kwargs",
        )
    values = {"documents": None} | dict(variables or {})
    conversation = [_name_reasoning(dict(message)) for message in messages]
    if continue_final_message:
        conversation[-1] = _mark_end(conversation[-1])
    values |= {
        "messages": conversation,
        "tools": [dict(tool) for tool in tools] if tools is not None else None,
        "add_generation_prompt": add_generation_prompt,
    }
    text = copy_context().run(_render, _compile(template), values)
    return _cut_at_mark(text) if continue_final_message else text


def _render(template: Any, values: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    from nbllm import template_sandbox

    template_sandbox.begin(_MAX_SECONDS)
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in template.generate(values):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > _MAX_CHARS:
                raise OverflowError(f"more than {_MAX_CHARS} characters")
            template_sandbox.check_time()
    except (TemplateError, ArithmeticError, TypeError, ValueError, NameError) as error:
        raise _failure(error) from error
    except (LookupError, AttributeError, RecursionError, OSError, MemoryError) as error:
        raise _failure(error) from error
    return "".join(pieces)


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


def _name_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give the reasoning of a message the names that templates read it under."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if message.get(name) is not None:
            return {"thinking": message[name]} | message | {"reasoning_content": message[name]}
    return message


def _mark_end(message: dict[str, Any]) -> dict[str, Any]:
    """A copy of a message whose text ends in `_END_MARK`; of several parts, the last with text."""
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + _END_MARK}
    parts = list(content) if isinstance(content, (list, tuple)) else []
    for index in reversed(range(len(parts))):
        if isinstance(parts[index], Mapping) and "text" in parts[index]:
            parts[index] = dict(parts[index]) | {"text": parts[index]["text"] + _END_MARK}
            return message | {"content": parts}
    raise InvalidRequestError(
        "continue_final_message: the last message has no text", parameter="continue_final_message"
    )


def _cut_at_mark(text: str) -> str:
    """What stands before `_END_MARK`. Templates that trim the text have trimmed the mark."""
    position = text.rfind(_END_MARK.strip())
    if position < 0:
        raise InvalidRequestError(
            "continue_final_message: the template does not show the last message's text",
            parameter="continue_final_message",
        )
    before = text[:position]
    return before if text.startswith(_END_MARK, position) else before.rstrip()


@lru_cache(maxsize=32)
def _compile(template: str) -> Any:
    from jinja2 import TemplateError

    from nbllm.template_sandbox import make_environment

    if len(template) > _MAX_TEMPLATE_CHARS:
        raise InvalidRequestError(
            f"the chat template is longer than {_MAX_TEMPLATE_CHARS} characters",
            parameter="chat_template",
        )
    try:
        return make_environment().from_string(template)
    except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
        raise InvalidRequestError(
            f"the chat template is not valid: {error}", parameter="chat_template"
        ) from error
