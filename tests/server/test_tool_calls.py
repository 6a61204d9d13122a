"""Tool calls and typed answers, through the openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from nbllm import LLM
from nbllm.server.serve import Server

CHAT: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"]},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def ask(client: openai.OpenAI, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 100, "seed": 1} | options
    return client.chat.completions.create(model="nbllm-demo", messages=CHAT, **options)


def check_weather(arguments: str) -> None:
    values = json.loads(arguments)
    assert set(values) == {"city", "unit"}
    assert values["city"] in ("Oslo", "Rome") and values["unit"] in ("C", "F")


def test_a_required_call_is_made(client: openai.OpenAI) -> None:
    reply = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    (choice,) = reply.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "weather")
    check_weather(call.function.arguments)


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    reply = ask(client, tools=[WEATHER, CLOCK], tool_choice=NAMED)
    (choice,) = reply.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("stop", "weather")
    check_weather(call.function.arguments)


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_streamed_calls_add_up_to_the_whole_ones(client: openai.OpenAI, tool_choice: Any) -> None:
    options = {"tools": [WEATHER], "tool_choice": tool_choice, "parallel_tool_calls": False}
    (whole,) = ask(client, **options).choices[0].message.tool_calls
    calls: dict[int, list[str]] = {}
    reasons = []
    for chunk in ask(client, stream=True, **options):
        (choice,) = chunk.choices
        assert not choice.delta.content
        reasons.append(choice.finish_reason)
        for piece in choice.delta.tool_calls or []:
            if piece.id is not None:
                assert piece.index not in calls
                calls[piece.index] = [piece.function.name, ""]
            calls[piece.index][1] += piece.function.arguments
    assert calls == {0: ["weather", whole.function.arguments]}
    assert [reason for reason in reasons if reason] == [
        "tool_calls" if tool_choice == "required" else "stop"
    ]


def test_each_choice_makes_calls_of_its_own(client: openai.OpenAI) -> None:
    reply = ask(client, tools=[WEATHER], tool_choice=NAMED, n=3, temperature=1.0)
    calls = [choice.message.tool_calls[0] for choice in reply.choices]
    assert len({call.id for call in calls}) == 3
    for call in calls:
        check_weather(call.function.arguments)


class Answer(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]
    is_cold: bool


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="nbllm-demo", messages=CHAT, response_format=Answer, max_tokens=60
    )
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_a_call_and_another_form_exclude_each_other(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(
            client,
            tools=[WEATHER],
            tool_choice="required",
            response_format={"type": "json_object"},
        )
    assert caught.value.param == "tool_choice"


def test_auto_needs_a_known_format(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_call_parser"):
        ask(client, tools=[WEATHER])


@pytest.fixture
def parsing_server(llm: LLM) -> Iterator[Server]:
    with llm.serve(tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        yield server


def test_the_models_own_calls_are_found(parsing_server: Server) -> None:
    text = '<think>Hm.</think>Yes.<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    form = {"structured_outputs": {"choice": [text]}}
    with parsing_server.client(max_retries=0) as client:
        reply = ask(client, tools=[CLOCK], tool_choice="auto", extra_body=form)
        message = reply.choices[0].message
        assert (message.reasoning, message.content) == ("Hm.", "Yes.")
        assert [call.function.name for call in message.tool_calls] == ["clock"]
        assert reply.choices[0].finish_reason == "tool_calls"
        pieces = list(ask(client, tools=[CLOCK], stream=True, extra_body=form))
    deltas = [chunk.choices[0].delta for chunk in pieces]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    names = [c.function.name for delta in deltas for c in delta.tool_calls or [] if c.id]
    assert names == ["clock"]


def test_a_parser_that_there_is_not_is_refused_when_the_server_starts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="hermes"):
        llm.serve(tool_call_parser="nobody's")
