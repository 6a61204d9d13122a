"""LangChain's ChatOpenAI: answers, streams, batches, typed answers, tools, embeddings.

OPENAI_BASE_URL and OPENAI_API_KEY say where the server is.
"""

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL = "nbllm-demo"
QUESTION = "What is the capital of France?"


class Person(BaseModel):
    """A person."""

    name: str
    city: str


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


model = ChatOpenAI(model=MODEL, temperature=0, max_retries=0)

answer = model.invoke([SystemMessage("Be short."), HumanMessage(QUESTION)])
assert "Paris" in answer.content, answer
assert answer.response_metadata["finish_reason"] == "stop"
assert answer.response_metadata["model_name"] == MODEL
usage = answer.usage_metadata
assert usage["input_tokens"] > 0 and usage["output_tokens"] > 0
assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

whole = model.invoke(QUESTION)
chunks = list(model.stream(QUESTION, stream_usage=True))
assert len(chunks) > 2
total = sum(chunks[1:], chunks[0])
assert total.content == whole.content
assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]

questions = [QUESTION, "What is the capital of Japan?", "What is 3 + 4?"]
answers = [answer.content for answer in model.batch(questions)]
assert answers[0] == whole.content
assert "Tokyo" in answers[1] and "7" in answers[2], answers


async def ask_at_once() -> list[str]:
    replies = await asyncio.gather(*(model.ainvoke(question) for question in questions))
    streamed = "".join([chunk.content async for chunk in model.astream(QUESTION)])
    assert streamed == whole.content
    return [reply.content for reply in replies]


assert asyncio.run(ask_at_once()) == answers

chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | model
assert chain.invoke({"country": "France"}).content == whole.content

for method in ("json_schema", "function_calling"):
    typed = model.with_structured_output(Person, method=method)
    person = typed.invoke("My name is Ada and I live in London.")
    assert isinstance(person, Person), (method, person)
    assert person.name and person.city

loose = model.with_structured_output(None, method="json_mode").invoke("Ada as JSON, please.")
assert isinstance(loose, dict), loose

asking = model.bind_tools([get_weather], tool_choice="get_weather")
call = asking.invoke("How is the weather in Paris?")
assert isinstance(call, AIMessage)
assert [made["name"] for made in call.tool_calls] == ["get_weather"]
assert isinstance(call.tool_calls[0]["args"]["city"], str)
result = get_weather.invoke(call.tool_calls[0])
assert isinstance(result, ToolMessage)
after = model.bind_tools([get_weather], tool_choice="none").invoke(
    [HumanMessage("How is the weather in Paris?"), call, result]
)
assert after.content and not after.tool_calls

streamed_calls = list(asking.stream("How is the weather in Paris?"))
assert (
    sum(streamed_calls[1:], streamed_calls[0]).tool_calls[0]["args"] == call.tool_calls[0]["args"]
)

responses = ChatOpenAI(model=MODEL, temperature=0, use_responses_api=True, max_retries=0)
assert responses.invoke(QUESTION).text == whole.content

completed = OpenAI(model=MODEL, temperature=0, max_tokens=7, max_retries=0).invoke("What is 3 + 4?")
assert "7" in completed, completed

# Without the check the texts go as they are: it would count GPT's tokens.
embeddings = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, max_retries=0)
vectors = embeddings.embed_documents(["a cat", "a dog"])
assert len(vectors[0]) == len(vectors[1]) > 10
assert embeddings.embed_query("a cat") == pytest.approx(vectors[0], abs=1e-3)
