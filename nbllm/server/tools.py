"""What a chat request says about tools: how its text is constrained, and read.

    none               the tools are told to the model, and its text is content
    auto               a parser of the model's own format finds the calls in its text
    required           the text is constrained to a JSON array of calls of any of the tools
    a named function   the text is constrained to that function's arguments

Source: OpenAI's API reference, "Create chat completion"; the constraints are those of vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nbllm.errors import InvalidRequestError
from nbllm.outputs import CompletionOutput
from nbllm.sampling_params import SamplingParams, StructuredOutputsParams
from nbllm.server.reasoning_parsers import make_reasoning_parser
from nbllm.server.tool_parsers import MAX_CALLS, CallPiece, Delta, make_tool_parser
from nbllm.server.tool_parsers.tool_parser import new_call_id

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,64}", re.ASCII)
_DEFINITIONS = ("$defs", "definitions")
# What a chat template holds that has a format of calls -> the parser of that format.
_MARKERS = {
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
    "<|channel|>": "openai",
}

Mode = Literal["none", "auto", "required", "named"]


class ChoiceParser(Protocol):
    """Reads the text of one choice as it grows."""

    def feed(self, text: str) -> list[Delta]:
        """What a piece of text adds."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the text."""
        ...


def read_choice(parser: ChoiceParser | None, completion: CompletionOutput) -> list[Delta]:
    """What is new in a choice, and at its end all that was held back; without a parser, content."""
    if parser is None:
        return [Delta(content=completion.text)] if completion.text else []
    deltas = parser.feed(completion.text)
    return deltas if completion.finish_reason is None else deltas + parser.finish()


@dataclass(frozen=True, slots=True)
class Parsers:
    """Which formats a server reads.

    Attributes:
        tool_call: name of the parser of calls, or None.
        reasoning: name of the parser of reasoning, or None.
    """

    tool_call: str | None = None
    reasoning: str | None = None

    @classmethod
    def choose(
        cls, tool_call: str | None, reasoning: str | None, chat_template: str | None
    ) -> Parsers:
        """Check the names; "auto" goes by the marks of a format in the model's template.

        Raises:
            InvalidRequestError: there is no parser of such a name.
        """
        if tool_call == "auto":
            found = (kind for mark, kind in _MARKERS.items() if mark in (chat_template or ""))
            tool_call = next(found, None)
        if tool_call is not None:
            make_tool_parser(tool_call)
        if reasoning is not None:
            make_reasoning_parser(reasoning)
        return cls(tool_call, reasoning)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says about tools.

    Attributes:
        mode: how the model is to use them.
        tools: as the client sent them, for the template.
        name: of the function that is to be called, if it is named.
        parallel: more than one call may be made.
    """

    mode: Mode
    tools: Sequence[dict[str, Any]] = field(default=())
    name: str = ""
    parallel: bool = True

    @classmethod
    def of(
        cls,
        tools: list[dict[str, Any]] | None,
        tool_choice: str | dict[str, Any] | None,
        *,
        parallel: bool,
    ) -> ToolChoice:
        """Check what a client sent.

        Raises:
            InvalidRequestError: a tool has no right name or schema, or the choice fits none.
        """
        if tools is None:
            if tool_choice not in (None, "none"):
                raise _error("tool_choice", "needs tools")
            return cls("none")
        names = _check_tools(tools)
        if isinstance(tool_choice, dict):
            function = tool_choice.get("function", tool_choice)  # /v1/responses has it flat
            name = function.get("name") if isinstance(function, dict) else None
            is_known = isinstance(name, str) and name in names
            if tool_choice.get("type") != "function" or not is_known:
                raise _error("tool_choice", "must name one of the tools")
            return cls("named", tools, str(name), parallel)
        mode = "auto" if tool_choice is None else tool_choice
        if mode not in ("none", "auto", "required"):
            raise _error("tool_choice", "must be none, auto, required or name a function")
        return cls(mode, tools, parallel=parallel)  # type: ignore[arg-type]

    def constraint(self) -> StructuredOutputsParams | None:
        """What the text must be like.

        Raises:
            InvalidRequestError: two tools have different definitions of the same name.
        """
        if self.mode == "named":
            function = next(t["function"] for t in self.tools if t["function"]["name"] == self.name)
            return StructuredOutputsParams(json=_parameters(function), disable_any_whitespace=True)
        if self.mode != "required":
            return None
        definitions: dict[str, dict[str, Any]] = {}
        calls = [_call_schema(tool["function"], definitions) for tool in self.tools]
        schema: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_CALLS if self.parallel else 1,
            "items": {"anyOf": calls},
        }
        return StructuredOutputsParams(json=schema | definitions, disable_any_whitespace=True)

    def sampling_params(self, params: SamplingParams) -> SamplingParams:
        """How to sample, so that calls can be made and read.

        Raises:
            InvalidRequestError: a call is required, and another form is asked for, too.
        """
        if self.mode == "auto":  # the marks of calls may be special tokens
            return params.clone(skip_special_tokens=False)
        constraint = self.constraint()
        if constraint is None:
            return params
        if params.structured_outputs is not None:
            raise _error("tool_choice", "requires a call, and another form is asked for, too")
        return params.clone(structured_outputs=constraint)

    def parser(self, parsers: Parsers) -> ChoiceParser | None:
        """Reads the text of one choice; None if all of it is content.

        Raises:
            InvalidRequestError: the model's own format of calls is not known.
        """
        if self.mode == "named":
            return _NamedCall(self.name)
        if self.mode == "required":
            return _CallArray()
        calls = None
        if self.mode == "auto":
            if parsers.tool_call is None:
                raise _error(
                    "tool_choice",
                    "auto needs to know this model's format of calls: serve(tool_call_parser=...), "
                    "or choose required",
                )
            calls = make_tool_parser(parsers.tool_call)
        if parsers.reasoning is None:
            return calls
        return _Reasoned(make_reasoning_parser(parsers.reasoning), calls)


class _NamedCall:
    """All of the text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._has_begun:
            return [Delta(call=CallPiece(0, arguments=text))]
        self._has_begun = True
        return [Delta(call=CallPiece(0, new_call_id(), self._name, text))]

    def finish(self) -> list[Delta]:
        return []


class _CallArray:
    """An array of calls, which is Mistral's format behind its marker."""

    def __init__(self) -> None:
        self._parser = make_tool_parser("mistral", new_call_id)
        self._parser.feed("[TOOL_CALLS]")
        self._text: list[str] = []
        self._has_called = False

    def feed(self, text: str) -> list[Delta]:
        self._text.append(text)
        deltas = [delta for delta in self._parser.feed(text) if delta.call is not None]
        self._has_called = self._has_called or bool(deltas)
        return deltas

    def finish(self) -> list[Delta]:
        deltas = [delta for delta in self._parser.finish() if delta.call is not None]
        if deltas or self._has_called:
            return deltas
        return [Delta(content="".join(self._text))]  # it was cut off before its first call


class _Reasoned:
    """Reasoning first; what is content goes on to the parser of calls."""

    def __init__(self, reasoning: ChoiceParser, calls: ChoiceParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    def feed(self, text: str) -> list[Delta]:
        return self._pass_on(self._reasoning.feed(text))

    def finish(self) -> list[Delta]:
        deltas = self._pass_on(self._reasoning.finish())
        return deltas if self._calls is None else deltas + self._calls.finish()

    def _pass_on(self, deltas: list[Delta]) -> list[Delta]:
        if self._calls is None:
            return deltas
        passed: list[Delta] = []
        for delta in deltas:
            passed += self._calls.feed(delta.content) if delta.content else [delta]
        return passed


def _check_tools(tools: list[dict[str, Any]]) -> set[str]:
    """The functions' names."""
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise _error("tools", f"must be 1 to {MAX_TOOLS}, or be left out")
    names: set[str] = set()
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise _error("tools", "each must be of type function and hold a function")
        name = function.get("name")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise _error("tools", "a name is 1 to 64 letters, digits, or any of _-.:/")
        if name in names:
            raise _error("tools", "two have the same name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise _error("tools", "parameters must be a JSON schema")
        names.add(name)
    return names


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """A function's schema; one without takes no arguments."""
    return function.get("parameters") or {"type": "object", "properties": {}}


def _call_schema(
    function: dict[str, Any], definitions: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The schema of a call; what its parameters refer to goes to the root, where it is sought."""
    parameters = dict(_parameters(function))
    for key in _DEFINITIONS:
        own = parameters.pop(key, None) or {}
        if not isinstance(own, dict):
            raise _error("tools", f"{key} must be an object")
        for name, schema in own.items():
            known = definitions.setdefault(key, {})
            if known.setdefault(name, schema) != schema:
                raise _error("tools", f"two have different definitions of {name:.64}")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _error(parameter: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{parameter}: {rule}", parameter=parameter)
