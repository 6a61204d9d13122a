"""/v1/responses, through the openai client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from nbllm import LLM
from nbllm.errors import RequestFailedError
from nbllm.server.response_items import chat_messages
from nbllm.server.responses import ResponseStore, StoredResponse
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
QUESTION = "What is the capital of France?"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather now.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"type": "function", "name": "clock", "parameters": None}
NAMED = {"type": "function", "name": "weather"}


class Answer(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]
    is_cold: bool


def ask(client: openai.OpenAI, input: Any = QUESTION, **options: Any) -> Any:
    options = {"temperature": 0, "max_output_tokens": 100} | options
    return client.responses.create(model="nbllm-demo", input=input, **options)


def text_of_chat(client: openai.OpenAI, messages: Any) -> str | None:
    reply = client.chat.completions.create(
        model="nbllm-demo", messages=messages, temperature=0, max_tokens=100
    )
    return reply.choices[0].message.content


def without_ids(items: Any) -> list[dict[str, Any]]:
    return [item.model_dump(exclude={"id", "call_id"}) for item in items]


def test_the_text_and_the_usage_are_those_of_a_chat(client: openai.OpenAI) -> None:
    response = ask(client, instructions="Be brief.", metadata={"a": "b"})
    chat = client.chat.completions.create(
        model="nbllm-demo",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTION},
        ],
        temperature=0,
        max_tokens=100,
    )
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    usage = response.usage
    assert usage.input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens
    assert usage.total_tokens == chat.usage.total_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert response.id.startswith("resp_")
    assert (response.object, response.status, response.error) == ("response", "completed", None)
    assert (response.metadata, response.instructions) == ({"a": "b"}, "Be brief.")
    assert (response.temperature, response.tools, response.tool_choice) == (0, [], "auto")
    type(response).model_validate(response.model_dump())  # the client itself does not check


def test_a_response_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = ask(client, max_output_tokens=2, extra_body={"ignore_eos": True})
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.usage.output_tokens == 2


@pytest.mark.parametrize(
    "content",
    [
        "What is the capital\nof France?",
        [
            {"type": "input_text", "text": "What is the capital"},
            {"type": "input_text", "text": "of France?"},
        ],
    ],
    ids=["string", "parts"],
)
def test_the_input_may_be_messages(client: openai.OpenAI, content: Any) -> None:
    items = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}]
    messages = [
        {"role": "system", "content": "Answer.\nBe brief."},
        {"role": "user", "content": "What is the capital\nof France?"},
    ]
    response = ask(client, items, instructions="Answer.")
    assert response.output_text == text_of_chat(client, messages)


def test_a_conversation_goes_on_without_the_earlier_instructions(client: openai.OpenAI) -> None:
    first = ask(client, instructions="Be brief.")
    second = ask(client, "And of Italy?", previous_response_id=first.id)
    third = ask(client, "Why?", previous_response_id=second.id)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert second.previous_response_id == first.id
    assert second.output_text == text_of_chat(client, messages)
    messages += [
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "Why?"},
    ]
    assert third.output_text == text_of_chat(client, messages)
    by_hand = [{"role": "user", "content": QUESTION}, *first.output]
    again = ask(client, [*by_hand, {"role": "user", "content": "And of Italy?"}])
    assert again.output_text == second.output_text


def test_a_response_is_kept_until_it_is_deleted(client: openai.OpenAI) -> None:
    response = ask(client)
    assert client.responses.retrieve(response.id) == response
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(response.id)
    with pytest.raises(openai.BadRequestError) as refused:
        list(client.responses.retrieve(response.id, stream=True))
    assert refused.value.param == "stream"
    client.responses.delete(response.id)
    for use in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            use(response.id)
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, previous_response_id=response.id)
    assert unknown.value.param == "previous_response_id"


def test_a_response_that_is_not_to_be_stored_is_not_kept(client: openai.OpenAI) -> None:
    response = ask(client, store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_what_a_client_calls_its_request_is_not_the_key_to_a_response(
    client: openai.OpenAI,
) -> None:
    first, second = (ask(client, extra_headers={"X-Request-Id": "same"}) for _ in range(2))
    assert first.id != second.id


def test_responses_that_were_not_used_make_room() -> None:
    store = ResponseStore(max_responses=2, max_bytes=30)
    store.put("a", StoredResponse(b"1234", b"1234"))
    store.put("b", StoredResponse(b"1234", b"1234"))
    assert store.get("a") is not None
    store.put("c", StoredResponse(b"1234", b"1234"))
    assert [name for name in "abc" if store.get(name)] == ["a", "c"]
    store.put("d", StoredResponse(b"1" * 20, b""))
    assert [name for name in "acd" if store.get(name)] == ["c", "d"]
    store.put("e", StoredResponse(b"1" * 31, b""))
    assert not any(store.get(name) for name in "abcde")


def test_a_stream_tells_the_events_in_order(client: openai.OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert num_deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage
    assert client.responses.retrieve(events[0].response.id) == events[-1].response
    for event in events:
        type(event).model_validate(event.model_dump())


def test_the_lines_of_a_stream_name_their_events(send: Send, server: Server) -> None:
    body = {"input": "Hi", "stream": True, "max_output_tokens": 2}
    status, headers, text = send(server, "POST", "/v1/responses", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    for event in events:
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


def test_a_stream_that_is_cut_off_ends_as_incomplete(client: openai.OpenAI) -> None:
    options: Any = {"max_output_tokens": 2, "extra_body": {"ignore_eos": True}}
    last = list(ask(client, stream=True, **options))[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_the_clients_stream_helper_adds_the_events_up(client: openai.OpenAI) -> None:
    whole = ask(client)
    with client.responses.stream(
        model="nbllm-demo", input=QUESTION, temperature=0, max_output_tokens=100
    ) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == whole.output_text


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="nbllm-demo", input=QUESTION, text_format=Answer, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Answer)
    assert response.text is not None
    assert getattr(response.text.format, "type", None) == "json_schema"
    with client.responses.stream(
        model="nbllm-demo", input=QUESTION, text_format=Answer, max_output_tokens=60
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Answer)


def test_json_may_be_asked_for_without_a_schema(send: Send, server: Server) -> None:
    body = {"input": QUESTION, "text": {"format": {"type": "json_object"}}, "temperature": 0}
    status, _, reply = send(server, "POST", "/v1/responses", body | {"max_output_tokens": 5})
    assert status == 200, reply
    assert reply["output"][0]["content"][0]["text"].lstrip().startswith("{")


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_is_made_and_its_output_goes_back(client: openai.OpenAI, tool_choice: Any) -> None:
    options: Any = {"tools": [WEATHER], "tool_choice": tool_choice, "parallel_tool_calls": False}
    first = ask(client, **options)
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    stored = ask(client, [output], previous_response_id=first.id)
    by_hand = ask(client, [{"role": "user", "content": QUESTION}, call, output])
    assert stored.output_text == by_hand.output_text
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "12 degrees"},
    ]
    assert stored.output_text == text_of_chat(client, messages)


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_streamed_calls_add_up_to_the_whole_ones(client: openai.OpenAI, tool_choice: Any) -> None:
    options: Any = {"tools": [WEATHER], "tool_choice": tool_choice, "parallel_tool_calls": False}
    whole = ask(client, **options)
    events = list(ask(client, stream=True, **options))
    (added,) = [e.item for e in events if e.type == "response.output_item.added"]
    (done,) = [e.item for e in events if e.type == "response.output_item.done"]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    (arguments,) = [
        e.arguments for e in events if e.type == "response.function_call_arguments.done"
    ]
    assert (added.call_id, added.name, added.arguments) == (done.call_id, "weather", "")
    assert "".join(deltas) == arguments == done.arguments == whole.output[0].arguments
    assert events[-1].response.output == [done]
    assert without_ids([done]) == without_ids(whole.output)


def test_a_named_call_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = ask(client, tools=[WEATHER], tool_choice=NAMED, max_output_tokens=1)
    assert response.status == response.output[0].status == "incomplete"


def test_tools_may_be_offered_and_not_used(client: openai.OpenAI) -> None:
    response = ask(client, tools=[WEATHER, CLOCK], tool_choice="none")
    assert response.output_text == ask(client).output_text
    assert [tool.name for tool in response.tools] == ["weather", "clock"]
    assert ask(client, tools=[], tool_choice="auto").output_text == response.output_text


@pytest.fixture
def parsing_server(llm: LLM) -> Iterator[Server]:
    with llm.serve(tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        yield server


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_reasoning_text_and_calls_are_items_of_their_own(
    parsing_server: Server, is_streamed: bool
) -> None:
    text = '<think>Hm.</think>Yes.<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    form = {"structured_outputs": {"choice": [text]}}
    with parsing_server.client(max_retries=0) as client:
        response = ask(client, tools=[CLOCK], extra_body=form, stream=is_streamed)
        if is_streamed:
            events = list(response)
            thought = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
            assert "".join(thought) == "Hm."
            done = [e.item for e in events if e.type == "response.output_item.done"]
            response = events[-1].response
            assert response.output == done
    thought, message, call = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert (message.type, response.output_text) == ("message", "Yes.")
    assert (call.type, call.name, call.arguments) == ("function_call", "clock", "{}")
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_call_that_turns_out_to_be_none_is_text_of_the_response(parsing_server: Server) -> None:
    text = '<tool_call>{"name": "clock", "arguments": {"a": oops}}</tool_call>'
    form = {"structured_outputs": {"choice": [text]}}
    with parsing_server.client(max_retries=0) as client:
        options: Any = {"tools": [CLOCK], "extra_body": form}
        whole = ask(client, **options)
        events = list(ask(client, stream=True, **options))
    assert without_ids(events[-1].response.output) == without_ids(whole.output)
    assert whole.output_text == text
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [item.status for item in done if item.type == "function_call"] == ["incomplete"]


def test_what_the_assistant_did_in_one_turn_is_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "2", "output": "yes"},
    ]
    said, output = chat_messages(items, None)
    assert (said["content"], said["reasoning_content"]) == ("Let me see.", "Hm")
    assert [call["function"]["name"] for call in said["tool_calls"]] == ["f", "g"]
    assert output == {"role": "tool", "tool_call_id": "2", "content": "yes"}


@pytest.mark.parametrize(
    "item",
    [
        {"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]},
        {"role": "user", "content": [{"type": "input_file", "file_id": "x"}]},
        {"role": "user", "content": [{"type": "input_text"}]},
        {"role": "user", "content": 5},
        {"role": "user", "content": "a", "type": ["message"]},
        {"role": "user"},
        {"role": ["user"], "content": "a"},
        {"role": "robot", "content": "a"},
        {"type": "item_reference", "id": "x"},
        {"type": "function_call", "call_id": "1", "name": "f"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"},
        {"type": "function_call_output", "call_id": "nobody's", "output": "a"},
        {"type": "function_call_output", "call_id": ["1"], "output": "a"},
        {"type": "reasoning", "content": 5},
        5,
    ],
)
def test_items_of_another_kind_are_refused(send: Send, server: Server, item: Any) -> None:
    status, _, reply = send(server, "POST", "/v1/responses", {"input": [item]})
    assert status == 400, reply
    assert reply["error"]["param"] == "input"
    assert "messages" not in reply["error"]["message"]


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": "a " * 3000}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "frob"}}}}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": {}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}, 5]}, "tools"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "text": {"format": {"type": "json_object"}},
            },
            "tool_choice",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    send: Send, server: Server, options: dict[str, Any], parameter: str
) -> None:
    status, _, reply = send(server, "POST", "/v1/responses", {"input": "Hi"} | options)
    assert status == 400, reply
    assert reply["error"]["param"] == parameter


@pytest.mark.parametrize("field", ["tools", "input"])
def test_a_number_beyond_all_bounds_is_refused(send: Send, server: Server, field: str) -> None:
    body = b'{"input": "Hi", "%s": [{"type": "function", "role": 1e999}]}' % field.encode()
    status, _, reply = send(server, "POST", "/v1/responses", body)
    assert (status, reply["error"]["param"]) == (400, field)


def test_a_stream_that_fails_says_so(
    llm: LLM, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    astream = llm.astream

    async def fail_soon(*args: Any, **options: Any) -> AsyncIterator[Any]:
        async for output in astream(*args, **options):
            yield output
            raise RequestFailedError("a path that nobody must see")

    monkeypatch.setattr(llm, "astream", fail_soon)
    events = list(ask(client, stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    failed = events[-1].response
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    assert "path" not in failed.error.message
    assert failed.output[0].status == "incomplete" and failed.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.id)


def test_a_client_that_leaves_ends_the_generation(llm: LLM, client: openai.OpenAI) -> None:
    before = llm.get_metrics()["request_success_abort"]
    stream = ask(client, stream=True, max_output_tokens=900, extra_body={"ignore_eos": True})
    response_id = next(iter(stream)).response.id
    stream.close()
    for _ in range(2_000):  # each round trip lets the engine run a step
        metrics = llm.get_metrics()
        if metrics["num_requests_running"] == 0:
            break
    assert metrics["request_success_abort"] == before + 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response_id)


def test_the_body_is_described(send: Send, server: Server) -> None:
    document = send(server, "GET", "/openapi.json")[2]
    assert "instructions" in document["components"]["schemas"]["ResponsesRequest"]["properties"]
