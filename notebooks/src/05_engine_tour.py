# %% [markdown]
# # A tour of the engine
#
# You will see one request go through the engine, part by part, driven by hand: text becomes tokens,
# tokens get pages of the KV cache, a scheduler shares out steps, a sampler draws. Then a second
# request shares the first one's pages, and a crowd runs out of them. Each part is a file that you
# can read in minutes.

# %%
from array import array

from IPython.display import display

from nbllm import SamplingParams
from nbllm.config import EngineConfig
from nbllm.engine.loading import load_engine
from nbllm.engine.request import Request, RequestStatus
from nbllm.hub import resolve_model
from nbllm.tokenizer import Tokenizer

# %% [markdown]
# ## Text and tokens: [tokenizer.py](../nbllm/tokenizer.py)
#
# A model reads numbers. The tokenizer cuts a text into the pieces that it knows, frequent words
# whole and rare ones in parts, and gives each its id.

# %%
folder = resolve_model(None)  # the bundled model
tokenizer = Tokenizer.from_folder(folder)
ids = tokenizer.encode("What is the capital of France?")
print([tokenizer.token_text(i) for i in ids])
print(ids)

# %%
assert tokenizer.decode(ids) == "What is the capital of France?"

# %% [markdown]
# ## An engine without a thread: [engine.py](../nbllm/engine/engine.py)
#
# `LLM` runs an engine in a thread of its own. Here we make a small one and turn its crank
# ourselves: 15 usable pages of 8 tokens each, and at most 16 tokens in a step.

# %%
config = EngineConfig(
    device="cpu",
    dtype="float32",
    block_size=8,
    num_gpu_blocks_override=16,  # page 0 is never given away
    max_num_batched_tokens=16,
    max_num_seqs=4,
    max_model_len=120,
)
loaded = load_engine(folder, config)
engine = loaded.engine
engine.check_integrity = True  # after each step: no page lost, none owned twice

# %% [markdown]
# ## A request: [request.py](../nbllm/engine/request.py)
#
# It has its token ids, prompt first, and `num_computed_tokens`: how many of them have keys and
# values in the cache. There is no "prefill" or "decode": each step computes some more tokens, and
# whenever the last one is reached, a new one is sampled.


# %%
def make_request(name: str, prompt: str, max_tokens: int = 12) -> Request:
    token_ids = array("I", tokenizer.encode(prompt, add_special_tokens=False))
    return Request(
        request_id=name,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=SamplingParams(temperature=0),
        max_tokens=max_tokens,
        seed=0,
        eos_token_ids=frozenset(loaded.model_config.eos_token_ids),
    )


def chat(question: str) -> str:
    """The prompt of a chat: the model's template puts its marks around each message."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


first = make_request("first", chat("What is the capital of France?"))
engine.add(first)
first.status, first.num_tokens, first.num_computed_tokens

# %%
assert first.status is RequestStatus.WAITING
assert not first.block_table  # who waits owns nothing

# %% [markdown]
# ## Steps: [scheduler.py](../nbllm/engine/scheduler.py)
#
# The prompt is longer than a step may be, so that it is computed in chunks. Watch `computed` catch
# up with `tokens`; from then on each step adds one token.

# %%
print("step  computed  tokens  pages")
while not first.is_finished:
    engine.step()
    computed, tokens, pages = first.num_computed_tokens, first.num_tokens, first.block_table
    print(f"{engine.num_steps:4}  {computed:8}  {tokens:6}  {pages}")
print(first.finish_reason.value, tokenizer.decode(first.token_ids[first.num_prompt_tokens :]))

# %%
num_chunks = -(-first.num_prompt_tokens // 16)
assert num_chunks > 1  # chunked prefill
assert engine.num_steps == num_chunks + (first.num_tokens - first.num_prompt_tokens) - 1
assert engine.block_manager.num_free_blocks == 15  # all pages are free again

# %% [markdown]
# ## Pages: [block_manager.py](../nbllm/engine/block_manager.py)
#
# A request's keys and values lie in pages of 8 tokens, anywhere in the cache; its *block table*
# says where. This draws the cache: a colour for each owner, stripes of two colours for a page that
# is shared, and light grey for a free page that still holds a prefix that someone may ask for.

# %%
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]  # told apart by all eyes


def show_pages(requests: list[Request]) -> None:
    """Draw the pages of the cache and who owns them."""
    blocks = engine.block_manager
    parts = []
    for page in range(1, blocks.num_blocks):
        owners = [i for i, request in enumerate(requests) if page in request.block_table]
        x = 4 + (page - 1) * 44
        cached = page in blocks._cached
        fill = "#dddddd" if cached else "#ffffff"
        parts.append(f'<rect x="{x}" y="4" width="40" height="40" fill="{fill}" stroke="#888888"/>')
        for row, owner in enumerate(owners):
            height = 40 / len(owners)
            parts.append(
                f'<rect x="{x}" y="{4 + row * height}" width="40" height="{height}" '
                f'fill="{COLOURS[owner]}" stroke="#888888"/>'
            )
        ink = "#ffffff" if owners else "#555555"
        parts.append(
            f'<text x="{x + 20}" y="29" text-anchor="middle" font-size="13" '
            f'font-family="sans-serif" fill="{ink}">{page}</text>'
        )
    lines = []
    for i, request in enumerate(requests):
        table = ", ".join(map(str, request.block_table)) or "none"
        lines.append(f"{request.request_id}: {request.status.value}, pages {table}")
        parts.append(f'<rect x="4" y="{56 + i * 20}" width="12" height="12" fill="{COLOURS[i]}"/>')
        parts.append(
            f'<text x="22" y="{67 + i * 20}" font-size="13" font-family="sans-serif" '
            f'fill="#888888">{lines[-1]}</text>'
        )
    height = 60 + 20 * len(requests)
    picture = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="668" height="{height}" '
        f'viewBox="0 0 668 {height}" role="img"><title>Pages of the KV cache</title>'
        f"{''.join(parts)}</svg>"
    )
    text = "\n".join([f"{blocks.num_free_blocks} pages are free", *lines])
    display({"image/svg+xml": picture, "text/plain": text}, raw=True)


show_pages([])

# %% [markdown]
# ## Two requests, one beginning
#
# Both begin with the same system message. The full pages of the first prompt are still in the cache
# under their content, so that the second and third request start behind them, and own them
# together.

# %%
second = make_request("second", chat("What is the capital of Peru?"))
third = make_request("third", chat("What is 17 + 25?"))
engine.add(second)
engine.add(third)
engine.step()
show_pages([second, third])

# %%
shared = set(second.block_table) & set(third.block_table)
assert len(shared) == second.num_cached_tokens // 8 >= 1
print(f"{second.num_cached_tokens} of {second.num_prompt_tokens} prompt tokens were in the cache")

# %% [markdown]
# From now on both get their token from the same step, and a step may hold a chunk of somebody's
# prompt, too. This is continuous batching: nobody waits for a batch to end.

# %%
while engine.has_requests:
    engine.step()
for request in (second, third):
    print(tokenizer.decode(request.token_ids[request.num_prompt_tokens :]))

# %%
assert tokenizer.decode(second.token_ids).endswith("Lima.")
assert "42" in tokenizer.decode(third.token_ids)

# %% [markdown]
# ## Not enough pages
#
# Four stories want more than the 15 pages. The scheduler lets them begin, and when pages run out it
# *preempts* the one that came last: its pages go to the others, its tokens are kept, and later it
# is computed again from them, so that its text is the same.

# %%
names = ["Anna", "Felix", "Peter", "Maria"]
stories = [
    make_request(name, f"Once upon a time there was a fox called {name}", max_tokens=40)
    for name in names
]
for story in stories:
    engine.add(story)
while engine.scheduler.num_preemptions == 0:
    engine.step()
show_pages(stories)

# %%
(preempted,) = [s for s in stories if s.status is RequestStatus.WAITING]
assert preempted is stories[-1]
assert not preempted.block_table
while engine.has_requests:
    engine.step()
alone = make_request("alone", f"Once upon a time there was a fox called {names[-1]}", max_tokens=40)
engine.add(alone)
while engine.has_requests:
    engine.step()
assert alone.token_ids == preempted.token_ids
print(tokenizer.decode(preempted.token_ids))

# %% [markdown]
# ## What happens within a step
#
# [model_runner.py](../nbllm/engine/model_runner.py) brings the step's tokens to the device and runs
# the model; [decoder.py](../nbllm/models/decoder.py) is the model;
# [paged_attention.py](../kernels/nbllm_kernels/paged_attention.py) reads the pages through the
# block tables; [sampler.py](../nbllm/engine/sampler.py) draws a token for each row whose last token
# was computed. On a GPU a step in which all decode is one captured CUDA graph
# ([cuda_graph.py](../nbllm/engine/cuda_graph.py)).
#
# The counters say what all of this came to:

# %%
metrics = engine.metrics()
for name in (
    "num_steps",
    "prompt_tokens_by_source_local_compute",
    "prompt_tokens_cached",
    "generation_tokens",
    "num_preemptions",
    "request_success_stop",
    "request_success_length",
):
    print(f"{name:40}{metrics[name]:6}")

# %%
assert metrics["kv_cache_usage_perc"] == 0
assert metrics["request_success_stop"] >= 3

# %% [markdown]
# ## The same, live
#
# `LLM` runs such an engine in a thread, and `Dashboard` shows it at work: pages, batch, queue, and
# the requests of cells, frames, clients and widgets in one table. Here it is frozen while
# four stories are written.

# %%
from nbllm import LLM, Dashboard

engine.release()  # the memory of the one above
llm = LLM(device="cpu", dtype="float32")
dashboard = Dashboard(llm, interval_s=0.1)

# %% tags=["varies"]
dashboard

# %%
dashboard.start()
params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
streams = [llm.stream(f"Once upon a time there was a fox called {name}", params) for name in names]
for stream in streams:
    next(stream)  # its first token is there, and the engine goes on
dashboard.freeze()

# %%
for stream in streams:
    stream.close()  # ends its request, and frees its pages
assert llm.get_metrics()["num_requests_running"] == 0
assert llm.get_metrics()["kv_cache_usage_perc"] == 0

# %% [markdown]
# ## Give the memory back

# %%
llm.close()
