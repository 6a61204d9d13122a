"""OpenAI's client: vLLM's quickstart, and what it makes of replies itself: models, tool arguments,
streams put together.

OPENAI_BASE_URL and OPENAI_API_KEY say where the server is.
"""

import asyncio

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "nbllm-demo"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ABOUT_ADA = [{"role": "user", "content": "My name is Ada and I live in London."}]


class Person(BaseModel):
    """A person."""

    name: str
    city: str


client = OpenAI(max_retries=0)
options = {"model": MODEL, "temperature": 0}
assert client.models.retrieve(MODEL).id == MODEL

completion = client.completions.create(prompt="San Francisco is a", **options)
assert completion.choices[0].text
assert completion.usage is not None
assert completion.usage.completion_tokens <= 16  # what OpenAI's API does without max_tokens

reply = client.chat.completions.create(
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Tell me a joke."},
    ],
    **options,
)
assert reply.choices[0].message.role == "assistant"
assert reply.choices[0].message.content

parsed = client.chat.completions.parse(messages=ABOUT_ADA, response_format=Person, **options)
person = parsed.choices[0].message.parsed
assert isinstance(person, Person)

tool = openai.pydantic_function_tool(Person)
named = {"type": "function", "function": {"name": "Person"}}
called = client.chat.completions.parse(
    messages=ABOUT_ADA, tools=[tool], tool_choice=named, **options
)
(call,) = called.choices[0].message.tool_calls
assert isinstance(call.function.parsed_arguments, Person)

with client.chat.completions.stream(
    messages=ABOUT_ADA, response_format=Person, stream_options={"include_usage": True}, **options
) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_completion()
assert {"chunk", "content.delta", "content.done"} <= set(kinds)
assert final.choices[0].message.parsed == person
assert final.usage == parsed.usage

with client.chat.completions.stream(
    messages=ABOUT_ADA, tools=[tool], tool_choice=named, **options
) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_completion()
assert "tool_calls.function.arguments.done" in kinds
assert final.choices[0].message.tool_calls[0].function.parsed_arguments is not None

responded = client.responses.parse(
    model=MODEL, input=ABOUT_ADA[0]["content"], text_format=Person, temperature=0
)
assert isinstance(responded.output_parsed, Person)

raw = client.chat.completions.with_raw_response.create(messages=QUESTION, **options)
assert raw.headers["content-type"] == "application/json"
text = raw.parse().choices[0].message.content
assert "Paris" in text


async def ask_at_once() -> list[str]:
    async with AsyncOpenAI(max_retries=0) as client:

        async def ask() -> str:
            chunks = await client.chat.completions.create(messages=QUESTION, stream=True, **options)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        return await asyncio.gather(*(ask() for _ in range(8)))


assert set(asyncio.run(ask_at_once())) == {text}
