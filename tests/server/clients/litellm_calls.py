"""litellm: chats, streams, tools, typed answers, completions, embeddings; errors are its own.

OPENAI_BASE_URL and OPENAI_API_KEY say where the server is.
"""

import asyncio
import json

import litellm
import pytest
from pydantic import BaseModel

MODEL = "openai/nbllm-demo"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


class Person(BaseModel):
    """A person."""

    name: str
    city: str


litellm.telemetry = False
litellm.suppress_debug_info = True
options = {"model": MODEL, "temperature": 0, "num_retries": 0}

reply = litellm.completion(messages=MESSAGES, **options)
text = reply.choices[0].message.content
assert "Paris" in text
assert reply.choices[0].finish_reason == "stop"
assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens

chunks = list(
    litellm.completion(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
)
assert len(chunks) > 2
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens

at_once = asyncio.run(litellm.acompletion(messages=MESSAGES, **options))
assert at_once.choices[0].message.content == text

typed = litellm.completion(
    messages=[{"role": "user", "content": "My name is Ada and I live in London."}],
    response_format=Person,
    **options,
)
assert Person.model_validate_json(typed.choices[0].message.content).name

weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
named = {"type": "function", "function": {"name": "get_weather"}}
asked = litellm.completion(messages=MESSAGES, tools=[weather], tool_choice=named, **options)
(call,) = asked.choices[0].message.tool_calls
assert call.function.name == "get_weather"
assert isinstance(json.loads(call.function.arguments)["city"], str)

completed = litellm.text_completion(
    model="text-completion-openai/nbllm-demo",
    prompt="What is 3 + 4?",
    max_tokens=7,
    temperature=0,
)
assert "7" in completed.choices[0].text, completed

embedded = litellm.embedding(model=MODEL, input=["a cat", "a dog"], encoding_format="float")
first, second = (item["embedding"] for item in embedded.data)
assert len(first) == len(second) > 10 and first != second
assert embedded.usage.prompt_tokens > 0

with pytest.raises(litellm.NotFoundError, match="nbllm-demo"):
    litellm.completion(model="openai/other", messages=MESSAGES, num_retries=0)
with pytest.raises(litellm.AuthenticationError):
    litellm.completion(messages=MESSAGES, api_key="wrong", **options)
