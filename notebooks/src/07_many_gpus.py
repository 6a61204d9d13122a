# %% [markdown]
# # From one GPU to many
#
# You will see the same call go from one engine to an engine in each worker process, with the same
# answers, on Dask. Everything here runs on the CPU with the bundled model; on a machine with
# GPUs only the arguments of `LLM` change.

# %%
import os
import time

import dask.dataframe as dd
import pandas as pd

import nbllm
import nbllm.dask
from nbllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16)
frame = pd.DataFrame({"question": [f"What is {a} + {b}?" for a in range(20) for b in range(10)]})
parts = dd.from_pandas(frame, npartitions=4)

# %% [markdown]
# ## One engine, many threads
#
# A model that fits on a GPU wants one engine there and all the rows that there are: a step over
# many rows costs little more than one over a single row. Dask's threads give it several partitions
# at a time, and they all run in one continuous batch.

# %%
llm = LLM(device="cpu", dtype="float32")
lazy = nbllm.dask.generate(parts, "question", GREEDY, chat=False, out="answer", llm=llm)
assert llm.get_metrics()["num_steps"] == 0  # nothing has run yet
one_engine = lazy.compute()
one_engine.tail(3)

# %%
direct = frame.llm.generate("question", GREEDY, chat=False, out="answer", use_tqdm=False)
assert one_engine["answer"].tolist() == direct["answer"].tolist()
assert one_engine.index.equals(frame.index)

# %% [markdown]
# Why a batch pays: the first 40 rows, one at a time and all at once, on this machine.

# %% tags=["varies"]
prompts = frame["question"].tolist()[:40]


def run(batches: list[list[str]]) -> tuple[float, int]:
    """Seconds and steps of the engine."""
    begin, steps = time.perf_counter(), llm.get_metrics()["num_steps"]
    for batch in batches:
        llm.generate(batch, GREEDY, use_tqdm=False)
    return time.perf_counter() - begin, llm.get_metrics()["num_steps"] - steps


seconds, steps_one_by_one = run([[prompt] for prompt in prompts])
print(f"{os.cpu_count()} CPU cores")
print(f"one by one: {steps_one_by_one} steps, {seconds:.2f} s")
seconds, steps_at_once = run([prompts])
print(f"at once: {steps_at_once} steps, {seconds:.2f} s")

# %%
assert steps_at_once < steps_one_by_one / 10

# %% [markdown]
# ## An engine in each process
#
# Several GPUs, or several machines, want an engine each. An open `LLM` can't travel to another
# process, so pass its arguments as a dict instead: each worker makes one engine, the first time
# that it gets a partition.

# %% tags=["varies"]
begin = time.perf_counter()
lazy = nbllm.dask.generate(
    parts,
    "question",
    GREEDY,
    chat=False,
    out="answer",
    llm={"device": "cpu", "dtype": "float32"},
)
two_engines = lazy.compute(scheduler="processes", num_workers=2)
print(f"{time.perf_counter() - begin:.1f} s, most of it for two processes to start and load")

# %%
pd.testing.assert_frame_equal(two_engines, one_engine)

# %% [markdown]
# That is slower here, and it should be: the two workers share one CPU, and starting them takes
# longer than 200 rows of a tiny model. It pays where each worker has a device of its own and rows
# by the ten thousand.
#
# ## With GPUs
#
# Not run here, as this notebook must run everywhere.
#
# **One machine, several GPUs.** A Dask worker for each, which sees only its own (`dask-cuda` sets
# this up):
#
# ```python
# from dask_cuda import LocalCUDACluster
# from distributed import Client
#
# client = Client(LocalCUDACluster())  # one worker process for each GPU
# engine = {"model": "Qwen/Qwen3-8B"}
# faq = dd.read_parquet("faq/")
# nbllm.dask.generate(faq, "question", out="answer", llm=engine).to_parquet("answers/")
# ```
#
# **Many machines.** Ray Data, an actor for each engine and a GPU for each actor:
#
# ```python
# import nbllm, ray
#
# faq = ray.data.read_parquet("s3://bucket/faq/")
# nbllm.ray.generate(
#     faq, "question", out="answer", llm={"model": "Qwen/Qwen3-8B"}, num_workers=8
# ).write_parquet("s3://bucket/answers/")
# ```
#
# A seeded row says the same on whichever worker it lands, if their devices are of one kind. What
# nbllm does not do is to spread one model over several GPUs: the model must fit on one
# (`tensor_parallel_size` is 1).

# %%
from nbllm import InvalidRequestError

try:
    LLM(device="cpu", tensor_parallel_size=2)
except InvalidRequestError as error:
    print(error)
else:
    raise AssertionError("the text above is out of date")

# %% [markdown]
# ## Give the memory back
#
# The workers' engines went with their processes.

# %%
llm.close()
