# %% [markdown]
# # nbllm in five minutes
#
# You will see one language model in this kernel answer a cell, a DataFrame, sliders and an OpenAI
# client, all from the same batch. The bundled model is tiny, so everything here runs on a laptop
# without a network. Put a folder or a name from the Hugging Face Hub into `LLM(...)` to use
# another.

# %%
from nbllm import LLM, SamplingControls, SamplingParams

llm = LLM()
llm

# %% [markdown]
# ## Generate
#
# The names are vLLM's. All prompts run in one batch.

# %%
prompts = ["The capital of France is", "What is 17 + 25?", "The future of AI is"]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24)):
    print(f"{output.prompt!r}: {output.outputs[0].text.strip()!r}")

# %% [markdown]
# ## A DataFrame
#
# A column's name or a template. The result keeps your rows, order and index; a missing value is
# skipped, and a row that fails says why in `answer_error`.

# %%
import pandas as pd

df = pd.DataFrame({"country": ["France", "Japan", None, "Peru"]})
df.llm.generate("What is the capital of {country}?", SamplingParams(temperature=0), out="answer")

# %%
reviews = pd.Series(["A lovely little film.", "The soup was cold.", "I want my money back."])
reviews.llm.generate("Positive or negative? {}", SamplingParams(temperature=0), chat=False)

# %% [markdown]
# ## Sliders
#
# What the controls show goes into any call. Move them, then run the next cell again. Given a
# prompt, they draw the odds of the token after it.

# %%
start = SamplingParams(temperature=0.7, seed=1, max_tokens=40)
controls = SamplingControls(start, llm=llm, prompt="There was a")
controls

# %%
llm.generate("Once upon a time", controls.params)[0].outputs[0].text

# %% [markdown]
# ## Streaming
#
# Each item holds the text so far.

# %%
from IPython.display import display

shown = display("", display_id=True)
for output in llm.stream("Once upon a time", controls.params):
    shown.update(output.outputs[0].text)

# %% [markdown]
# ## An OpenAI client
#
# `serve()` opens the same engine to any client on this machine. The key is made anew each time and
# is not shown.

# %%
with llm.serve() as server, server.client() as client:
    reply = client.chat.completions.create(
        model=server.model_name,
        messages=[{"role": "user", "content": "What is the capital of Italy?"}],
        temperature=0,
    )
reply.choices[0].message.content

# %% [markdown]
# ## Give the memory back
#
# Running the cell that made `llm` again does it, too.

# %%
llm.close()
