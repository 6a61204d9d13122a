"""Items of /v1/responses -> messages as chat templates read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from nbllm.errors import InvalidRequestError

_ROLES = ("user", "assistant", "system", "developer")

Items = list[dict[str, Any]]


def chat_messages(items: Iterable[dict[str, Any]], instructions: str | None) -> Items:
    """Items as the messages of a chat.

    What the model said and called in one turn becomes one message of the assistant.

    Raises:
        InvalidRequestError: an item is of another kind or form, or is the output of no call.
    """
    messages: Items = []
    thought = ""  # belongs to what the assistant says next
    call_ids: set[str] = set()
    for item in items:
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought += _reasoning_text(item)
        elif kind == "message":
            messages.append(_message(item))
            if messages[-1]["role"] == "assistant":
                thought = _attach(messages[-1], thought)
        elif kind == "function_call":
            last = messages[-1] if messages else {}
            if last.get("role") != "assistant" or thought:
                last = {"role": "assistant", "content": ""}
                messages.append(last)
                thought = _attach(last, thought)
            call = _call(item)
            last.setdefault("tool_calls", []).append(call)
            call_ids.add(call["id"])
        elif kind == "function_call_output":
            call_id = item.get("call_id")
            if not isinstance(call_id, str) or call_id not in call_ids:
                _fail("a function_call_output needs the call_id of an earlier function_call")
            if item.get("output") is None:
                _fail("a function_call_output needs output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": item["output"]})
        else:
            _fail(f"items of type {kind!s:.40} are not supported")
    if instructions:
        # Many templates take only one system message, and only as the first.
        if messages and messages[0]["role"] == "system":
            content = messages[0]["content"]
            rest = content if isinstance(content, list) else [content]
            messages[0]["content"] = [instructions, *rest]
        else:
            messages.insert(0, {"role": "system", "content": instructions})
    return messages


def _message(item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        _fail(f"the role of a message must be one of {', '.join(_ROLES)}")
    if item.get("content") is None:
        _fail("a message needs content")
    return {"role": "system" if role == "developer" else role, "content": item["content"]}


def _call(item: dict[str, Any]) -> dict[str, Any]:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            _fail(f"a function_call needs {name}, a string")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"type": "function", "id": item["call_id"], "function": function}


def _reasoning_text(item: dict[str, Any]) -> str:
    parts = item.get("content") or []
    if not isinstance(parts, list):
        _fail("the content of reasoning must be a list of parts")
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _attach(message: dict[str, Any], thought: str) -> str:
    """Give a message its reasoning, under the name that templates know; nothing is left of it."""
    if thought:
        message["reasoning_content"] = thought
    return ""


def _fail(rule: str) -> NoReturn:
    raise InvalidRequestError(f"input: {rule}", parameter="input")
