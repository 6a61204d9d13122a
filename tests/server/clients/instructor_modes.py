"""instructor: pydantic models out of a chat, in each of its modes, whole and in parts.

OPENAI_BASE_URL and OPENAI_API_KEY say where the server is.
"""

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

MODEL = "nbllm-demo"
MESSAGES = [{"role": "user", "content": "My name is Ada and I live in London."}]


class Person(BaseModel):
    """A person."""

    name: str
    city: str


class Review(BaseModel):
    """What a review says."""

    sentiment: Literal["positive", "negative"]


plain = OpenAI(max_retries=0)

for mode in (
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
):
    client = instructor.from_openai(plain, mode=mode)
    options = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_retries": 0}
    person, reply = client.chat.completions.create_with_completion(response_model=Person, **options)
    assert isinstance(person, Person), (mode, person)
    assert person.name and person.city
    assert reply.usage.completion_tokens > 0

client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
parts = list(client.chat.completions.create_partial(response_model=Person, **options))
assert len(parts) > 1
assert parts[-1].model_dump() == person.model_dump(), (parts[-1], person)

review = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "The soup was cold and the waiter was rude."}],
    response_model=Review,
    temperature=0,
    max_retries=0,
)
assert review.sentiment in ("positive", "negative")
