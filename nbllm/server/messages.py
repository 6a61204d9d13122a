"""Messages as clients send them -> messages as chat templates read them."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from nbllm.errors import InvalidRequestError

MAX_MESSAGES = 2048
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the parts of contents, and read the arguments of earlier tool calls.

    Raises:
        InvalidRequestError: a message has no role, or holds something other than text.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        _fail(f"must be 1 to {MAX_MESSAGES}")
    return [_message(message) for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        _fail("each needs a role")
    message = message | {"content": _content(message.get("content"))}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    elif "tool_calls" in message:
        del message["tool_calls"]  # null, as openai's client sends it back
    return message


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _fail("content must be a string or a list of parts")
    return "\n".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    name = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        _fail("only parts of type text are understood: no images, sounds or files")
    text = part.get(name)
    if not isinstance(text, str):
        _fail(f"a part of type {kind} needs a {name}")
    return text


def _tool_call(call: Any) -> dict[str, Any]:
    """Templates want the arguments as an object; OpenAI's API has them as a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        _fail("a tool call needs a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            _fail("the arguments of a tool call must be JSON")
    result: dict[str, Any] = call | {"function": function | {"arguments": arguments or {}}}
    return result


def _fail(rule: str) -> NoReturn:
    raise InvalidRequestError(f"messages: {rule}", parameter="messages")
