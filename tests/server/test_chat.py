"""/v1/chat/completions, as OpenAI's client and vLLM's users call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from nbllm import LLM, SamplingParams
from nbllm.server.serve import Server

Send = Callable[..., tuple[int, dict[str, str], Any]]
CHAT: Any = [{"role": "user", "content": "What is the capital of France?"}]


def ask(send: Send, server: Server, **body: Any) -> dict[str, Any]:
    sent = {"messages": CHAT, "temperature": 0, "max_tokens": 8} | body
    status, _, reply = send(server, "POST", "/v1/chat/completions", sent)
    assert status == 200, reply
    return reply


def text_of(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def test_several_streamed_choices_have_one_role_and_one_reason_each(
    client: openai.OpenAI,
) -> None:
    options: Any = {"n": 3, "seed": 7, "temperature": 1.0, "max_completion_tokens": 10}
    whole = client.chat.completions.create(model="nbllm-demo", messages=CHAT, **options)
    chunks = list(
        client.chat.completions.create(
            model="nbllm-demo",
            messages=CHAT,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert [c.delta.role for c in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_are_those_of_the_cell(llm: LLM, client: openai.OpenAI, num_top: int) -> None:
    reply = client.chat.completions.create(
        model="nbllm-demo",
        messages=CHAT,
        temperature=0,
        logprobs=True,
        top_logprobs=num_top,
        max_completion_tokens=6,
    )
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=num_top)
    ours = llm.chat(CHAT, params)[0].outputs[0]
    assert ours.logprobs is not None
    got = reply.choices[0].logprobs
    assert got is not None and got.content is not None
    for token_id, entry, position in zip(ours.token_ids, ours.logprobs, got.content, strict=True):
        assert position.logprob == pytest.approx(entry[token_id].logprob, abs=1e-4)
        assert position.token == entry[token_id].decoded_token
        assert len(position.top_logprobs) == num_top
        ranked = [top.logprob for top in position.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)


def test_streamed_logprobs_are_complete(client: openai.OpenAI) -> None:
    options: Any = {"messages": CHAT, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(model="nbllm-demo", **options).choices[0].logprobs
    assert whole is not None and whole.content is not None
    tokens: list[str] = []
    for chunk in client.chat.completions.create(model="nbllm-demo", stream=True, **options):
        logprobs = chunk.choices[0].logprobs
        tokens += [item.token for item in (logprobs.content or [])] if logprobs else []
    assert tokens == [item.token for item in whole.content]


def test_the_text_parts_of_a_message_are_joined(send: Send, server: Server) -> None:
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": "of France?"},
    ]
    joined = [{"role": "user", "content": "What is the capital\nof France?"}]
    in_parts = ask(send, server, messages=[{"role": "user", "content": parts}])
    assert text_of(in_parts) == text_of(ask(send, server, messages=joined))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {"a": 1}}],
        [{"content": "a"}],
        [{"role": 5, "content": "a"}],
        [{"role": "assistant", "tool_calls": [5]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [],
        [5],
        [{"role": "user", "content": "a"}] * 2049,
        "text",
    ],
)
def test_messages_of_another_kind_are_refused(send: Send, server: Server, messages: Any) -> None:
    status, _, reply = send(server, "POST", "/v1/chat/completions", {"messages": messages})
    assert status == 400, reply
    assert reply["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"title": "a" * 70_000}}}, "structured_outputs"),
        ({"structured_outputs": {"frobnicate": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    send: Send, server: Server, options: dict[str, Any], parameter: str
) -> None:
    body = {"messages": CHAT} | options
    status, _, reply = send(server, "POST", "/v1/chat/completions", body)
    assert status == 400, reply
    assert reply["error"]["param"] == parameter


def test_max_completion_tokens_goes_before_max_tokens(send: Send, server: Server) -> None:
    reply = ask(send, server, max_completion_tokens=2, max_tokens=5, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 2
    assert reply["choices"][0]["finish_reason"] == "length"


def test_the_final_message_can_be_continued(llm: LLM, send: Send, server: Server) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "The capital of"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ids = llm.encode_chat(messages, **options)["prompt_token_ids"]
    continued = ask(send, server, messages=messages, return_token_ids=True, **options)
    assert continued["prompt_token_ids"] == ids
    assert (
        ask(send, server, messages=messages, continue_final_message=True)["usage"]
        == (continued["usage"])
    )
    echoed = ask(send, server, messages=messages, echo=True, **options)
    assert text_of(echoed) == "The capital of" + text_of(continued)
    bare = ask(send, server, add_generation_prompt=False, return_token_ids=True)
    expected = llm.encode_chat(CHAT, add_generation_prompt=False)["prompt_token_ids"]
    assert bare["prompt_token_ids"] == expected


def test_variables_reach_the_template(
    llm: LLM, send: Send, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ reasoning_effort }}|{{ enable_thinking }}|{{ documents[0].a }}|{{ x }}"
    monkeypatch.setattr(llm, "chat_template", template)
    reply = ask(
        send,
        server,
        reasoning_effort="none",
        documents=[{"a": "b"}],
        chat_template_kwargs={"x": "y"},
        return_token_ids=True,
    )
    prompt = llm.get_tokenizer().decode(reply["prompt_token_ids"])
    assert prompt == "none|False|b|y"


def test_a_conversation_that_openais_client_sends_back_is_understood(
    client: openai.OpenAI,
) -> None:
    answer = client.chat.completions.create(
        model="nbllm-demo", messages=CHAT, temperature=0, max_tokens=4
    )
    message: Any = answer.choices[0].message.model_dump()
    follow_up: Any = [*CHAT, message, {"role": "user", "content": "What is 1 + 1?"}]
    reply = client.chat.completions.create(
        model="nbllm-demo", messages=follow_up, temperature=0, max_tokens=4
    )
    assert reply.choices[0].message.content


def test_tools_may_be_offered_and_an_empty_list_is_none(send: Send, server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert text_of(ask(send, server, tools=[tool], tool_choice="none"))
    assert ask(send, server, tools=[])["usage"] == ask(send, server)["usage"]


def test_text_is_a_response_format_and_no_constraint(send: Send, server: Server) -> None:
    assert ask(send, server, response_format={"type": "text"}) | {"id": 0, "created": 0} == (
        ask(send, server) | {"id": 0, "created": 0}
    )


def test_schemas_regexes_and_choices_are_kept_to(send: Send, server: Server) -> None:
    named = {"name": "side", "schema": {"enum": ["left", "right"]}, "strict": True}
    response_format = {"type": "json_schema", "json_schema": named}
    reply = ask(send, server, max_tokens=30, response_format=response_format)
    assert text_of(reply).strip() in ('"left"', '"right"')
    for constraint, allowed in (
        ({"choice": ["left", "right"]}, {"left", "right"}),
        ({"regex": "(yes|no)!"}, {"yes!", "no!"}),
        ({"json": {"enum": [1, 2]}}, {"1", "2"}),
    ):
        reply = ask(send, server, max_tokens=30, structured_outputs=constraint)
        assert text_of(reply).strip() in allowed


def test_a_schema_that_is_not_understood_is_the_clients_fault(send: Send, server: Server) -> None:
    for constraint in ({"json": {"type": "frob"}}, {"regex": "("}, {"grammar": "start: ("}):
        body = {"messages": CHAT, "structured_outputs": constraint}
        status, _, reply = send(server, "POST", "/v1/chat/completions", body)
        assert status == 400, reply
        assert reply["error"]["param"] == "structured_outputs"
