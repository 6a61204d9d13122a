# %% [markdown]
# # A server in a cell
#
# You will see this kernel's model answer OpenAI's API: a chat, a stream, eight clients at once, a
# typed answer, while the cell keeps using the same engine.

# %%
from nbllm import LLM, SamplingParams

llm = LLM(dtype="float32")
server = llm.serve()

# %% [markdown]
# It listens on a free port of this machine only, with a random key that is in `server.api_key` and
# never in an output. Running the cell again replaces the server. `server.client()` is
# `openai.OpenAI(base_url=server.base_url, api_key=server.api_key)`; any other program can use these
# two.

# %%
assert server.url.startswith("http://127.0.0.1:")
assert server.api_key not in repr(server)
client = server.client()
reply = client.chat.completions.create(
    model=server.model_name,
    messages=[{"role": "user", "content": "What is the capital of Italy?"}],
    temperature=0,
)
print(reply.choices[0].message.content)
print(reply.usage.prompt_tokens, "tokens in,", reply.usage.completion_tokens, "out")

# %%
assert reply.choices[0].message.content == "The capital of Italy is Rome."
assert reply.choices[0].finish_reason == "stop"

# %% [markdown]
# ## A stream
#
# Tokens as they come; those that are there together come together.

# %% tags=["varies"]
stream = client.completions.create(
    model=server.model_name, prompt="Once upon a time", max_tokens=24, temperature=0, stream=True
)
pieces = [chunk.choices[0].text for chunk in stream]
print("|".join(pieces))

# %%
(direct,) = llm.generate(
    "Once upon a time", SamplingParams(temperature=0, max_tokens=24), use_tqdm=False
)
assert len(pieces) > 1
assert "".join(pieces) == direct.outputs[0].text  # the cell gets the same text

# %% [markdown]
# ## Eight clients at once
#
# Their requests share one continuous batch: each step of the engine computes a token for all of
# them.

# %%
from concurrent.futures import ThreadPoolExecutor

COUNTRIES = ["France", "Japan", "Peru", "Italy", "Spain", "Norway", "Egypt", "Canada"]


def ask(country: str) -> str:
    with server.client() as own_client:
        reply = own_client.chat.completions.create(
            model=server.model_name,
            messages=[{"role": "user", "content": f"What is the capital of {country}?"}],
            temperature=0,
        )
    return reply.choices[0].message.content


steps = llm.get_metrics()["num_steps"]
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(ask, COUNTRIES))
steps = llm.get_metrics()["num_steps"] - steps
print(*answers, sep="\n")

# %%
assert answers[0] == "The capital of France is Paris."
tokens = server.requests().tail(8)["completion_tokens"].sum()
assert steps < tokens  # one by one, each token would take a step

# %% [markdown]
# ## An answer in a form
#
# A JSON schema is enforced token by token, so that parsing can't fail.

# %%
import json

schema = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "city": {"type": "string"}},
    "required": ["name", "city"],
    "additionalProperties": False,
}
text = "Anna Keller lives in Oslo and works as a teacher."
reply = client.chat.completions.create(
    model=server.model_name,
    messages=[{"role": "user", "content": f"Extract the name and the city as JSON.\n\n{text}"}],
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    temperature=0,
)
person = json.loads(reply.choices[0].message.content)
assert person == {"name": "Anna Keller", "city": "Oslo"}
person

# %% [markdown]
# ## Who asked what
#
# The last thousand requests, as a DataFrame; `server.logs()` has lines of text, and `server.url +
# "/metrics"` the numbers that Prometheus reads.

# %% tags=["varies"]
server.requests().tail(4)

# %% [markdown]
# ## Give everything back
#
# Closing the model stops its servers, too.

# %%
client.close()
llm.close()
assert not server.is_running
