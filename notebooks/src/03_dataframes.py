# %% [markdown]
# # DataFrames: ask, extract, classify, and survive a crash
#
# You will see text turned into typed columns, labels with exact probabilities whose threshold moves
# afterwards for free, and a job whose process is killed in the middle and goes on where it was.

# %%
import pandas as pd

from nbllm import LLM, SamplingParams

llm = LLM(dtype="float32")
GREEDY = SamplingParams(temperature=0, max_tokens=16)

# %% [markdown]
# ## Ask
#
# A template names columns. Your rows, their order and their index stay; a missing value is never
# sent.

# %%
trips = pd.DataFrame(
    {"country": ["France", "Japan", None, "Peru"], "days": [3, 7, 2, 10]}, index=list("abcd")
)
trips = trips.llm.generate(
    "What is the capital of {country}?", GREEDY, chat=False, out="capital", use_tqdm=False
)
trips

# %%
assert trips.index.tolist() == list("abcd")
assert trips["capital"].dropna().tolist() == ["Paris", "Tokyo", "Lima"]

# %% [markdown]
# ## Extract
#
# A type for each field, and the engine lets only tokens through that fit: every row is valid JSON
# of this shape, by construction.

# %%
from dataclasses import dataclass


@dataclass
class Person:
    name: str
    city: str


mails = pd.DataFrame(
    {
        "text": [
            "Anna Keller lives in Oslo and works as a teacher.",
            "Paul Martin lives in Rome and works as a doctor.",
        ]
    }
)
people = mails.llm.extract(
    "text", Person, instruction="Extract the name and the city as JSON.", use_tqdm=False
)
people

# %%
assert people["name"].tolist() == ["Anna Keller", "Paul Martin"]
assert people["city"].tolist() == ["Oslo", "Rome"]
assert people.dtypes["name"] == "string"

# %% [markdown]
# ## Classify
#
# Nothing is generated here: the probability of each label is computed exactly, in one pass over the
# prompt. `label_p` is the label's, `label_margin` its lead.

# %%
reviews = pd.DataFrame(
    {
        "text": [
            "A lovely little film.",
            "The soup was cold.",
            "I want my money back.",
            "The hotel was clean and quiet.",
            "It is a film.",
        ]
    }
)
labelled = reviews.llm.classify(
    "Positive or negative? {text}", ["positive", "negative"], chat=False, use_tqdm=False
)
labelled.round(4)

# %%
expected = ["positive", "negative", "negative", "positive"]
assert labelled["label"].tolist()[:4] == expected
assert labelled["label_p"].between(0.5, 1).all()

# %% [markdown]
# What is too unsure for you is cut afterwards, from the stored probabilities: no model runs.

# %%
before = llm.get_metrics()["num_steps"]
cut = labelled.llm.threshold("label", 0.99)
assert llm.get_metrics()["num_steps"] == before
cut["label"]

# %% [markdown]
# ## Look before you leap
#
# `lint` says what a call would do before it spends much: rendered samples, exact token counts, and
# what would fail.

# %%
sums = pd.DataFrame({"question": [f"What is {a} + {b}?" for a in range(20) for b in range(10)]})
report = sums.llm.lint("question", GREEDY, probe=0, samples=1)
report

# %% [markdown]
# ## A crash in the middle
#
# With `journal=` each finished row is on disk within a second. To prove it, another Python process
# starts on the 200 sums, slowly (one row at a time), and is killed while it works: no clean-up, no
# last words.

# %% tags=["varies"]
import os
import subprocess
import sys
import tempfile
import time

import nbllm

os.environ["NBLLM_HOME"] = tempfile.mkdtemp()  # where journals are; ~/.nbllm without it
sums.to_parquet(os.path.join(os.environ["NBLLM_HOME"], "sums.parquet"))
job = """
import os, pandas as pd
from nbllm import LLM, SamplingParams
sums = pd.read_parquet(os.path.join(os.environ["NBLLM_HOME"], "sums.parquet"))
llm = LLM(dtype="float32", max_num_seqs=1)
params = SamplingParams(temperature=0, max_tokens=16)
sums.llm.generate("question", params, out="answer", journal="sums", llm=llm)
"""
child = subprocess.Popen([sys.executable, "-c", job], stderr=subprocess.DEVNULL)
while child.poll() is None and nbllm.jobs()["done"].sum() < 30:
    time.sleep(0.05)
child.kill()
child.wait()
killed = nbllm.jobs()
killed

# %%
assert 0 < killed["done"].item() < 200

# %% [markdown]
# The frame, the call and the finished rows are in the journal. `resume` computes the rest and gives
# back the whole frame.

# %% tags=["varies"]
before = llm.get_metrics()["request_success_stop"]
answers = nbllm.resume("sums", use_tqdm=False)
computed = llm.get_metrics()["request_success_stop"] - before
print(f"{killed['done'].item()} rows were on disk, {computed} were computed now")

# %%
assert computed == 200 - killed["done"].item()
some = sums.iloc[::10].llm.generate("question", GREEDY, out="answer", use_tqdm=False)
pd.testing.assert_frame_equal(answers.iloc[::10], some)  # as if nothing had happened
answers.tail(3)

# %% [markdown]
# ## Made again
#
# A frame remembers how it was made. `reproduce` computes a sample of its rows again, each alone,
# and compares.

# %%
again = nbllm.reproduce(answers, rows=5, llm=llm)
again

# %% [markdown]
# ## Give the memory back

# %%
llm.close()
