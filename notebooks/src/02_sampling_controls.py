# %% [markdown]
# # Sampling, with your hands on it
#
# You will see what a language model really computes, odds for the next token, and what each
# sampling parameter does to them: first as numbers, then as sliders whose values go into any call.

# %%
import math

import pandas as pd

from nbllm import LLM, InvalidRequestError, Playground, SamplingControls, SamplingParams

llm = LLM(dtype="float32")
PROMPT = "There was a"
STORY = "Once upon a time there was a"

# %% [markdown]
# ## The odds of one token
#
# A model reads a text and gives every token of its vocabulary a probability to come next.
# `logprobs=10` reports the ten likeliest, as natural logarithms.

# %%
params = SamplingParams(temperature=1, max_tokens=1, logprobs=10, seed=0)
entries = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].logprobs[0]
odds = pd.Series({entry.decoded_token: math.exp(entry.logprob) for entry in entries.values()})
odds.round(3)

# %%
assert odds.idxmax() == " bear"
assert 0.9 < odds.sum() <= 1  # ten of 3,072 tokens hold nearly all of it

# %% [markdown]
# ## Drawing from them
#
# The token is drawn by these odds. 200 continuations of one prompt (`n=200`, which compute the
# prompt once) come near to them:

# %%
params = SamplingParams(temperature=1, max_tokens=1, n=200, seed=1)
drawn = pd.Series([text.text for text in llm.generate(PROMPT, params)[0].outputs])
shares = pd.DataFrame({"odds": odds, "drawn": drawn.value_counts() / 200}).dropna()
shares.sort_values("odds", ascending=False).round(3)

# %%
assert abs((drawn == " bear").mean() - odds[" bear"]) < 0.1

# %% [markdown]
# ## Temperature and filters
#
# `temperature` below 1 makes the likely likelier, above 1 brings all closer together, and 0 always
# takes the likeliest. The filters cut the tail: `top_k` keeps so many tokens, `top_p` the fewest
# that together have such a share, `min_p` those with such a share of the best one's odds.


# %%
def animals(**options: float) -> int:
    """How many different tokens 100 draws come to."""
    params = SamplingParams(max_tokens=1, n=100, seed=1, **options)
    return len({text.text for text in llm.generate(PROMPT, params, use_tqdm=False)[0].outputs})


settings = {
    "temperature=0.3": animals(temperature=0.3),
    "temperature=1": animals(temperature=1),
    "temperature=2": animals(temperature=2),
    "top_k=3": animals(temperature=1, top_k=3),
    "top_p=0.5": animals(temperature=1, top_p=0.5),
    "min_p=0.5": animals(temperature=1, min_p=0.5),
}
pd.Series(settings, name="different tokens")

# %%
assert settings["temperature=0.3"] < settings["temperature=1"] < settings["temperature=2"]
assert settings["top_k=3"] == 3
assert settings["top_p=0.5"] == ((odds.cumsum() - odds) < 0.5).sum()
assert settings["min_p=0.5"] == (odds >= 0.5 * odds.max()).sum()

# %% [markdown]
# ## A seed is a promise
#
# The noise that draws a token depends on the seed and the token's position, and on nothing else: a
# seeded text is the same alone, in a crowd, today and tomorrow.

# %%
params = SamplingParams(temperature=1, seed=7, max_tokens=24)
alone = llm.generate(STORY, params, use_tqdm=False)[0].outputs[0].text
crowd = llm.generate([STORY, *["Tell me a story."] * 30], params, use_tqdm=False)
assert crowd[0].outputs[0].text == alone
alone

# %% [markdown]
# ## The sliders
#
# `SamplingControls` shows the same as a widget: with a model and a prompt it draws the odds, and
# moving a slider costs no computation of the model, only arithmetic.

# %%
start = SamplingParams(temperature=0.8, seed=7, max_tokens=24)
controls = SamplingControls(start, llm=llm, prompt=PROMPT)
controls

# %% [markdown]
# `.params` goes wherever sampling parameters go, and assigning works as well as dragging. A column
# of a frame may have its own: `{"temperature": df["temperature"]}`.

# %%
controls.values = {"temperature": 1.5, "top_k": 5}
assert controls.params.top_k == 5
llm.generate(STORY, controls.params, use_tqdm=False)[0].outputs[0].text

# %%
df = pd.DataFrame({"prompt": [STORY] * 3, "temperature": [0.0, 1.0, 3.0]})
sampling = {"temperature": df["temperature"], "seed": 3, "max_tokens": 12}
df.llm.generate("prompt", sampling, chat=False, out="story", use_tqdm=False)

# %% [markdown]
# What has no effect says why, and what is wrong says so beside its control; `.params` then raises
# it.

# %%
controls.values = {"temperature": 0.0}
assert "top_p" in controls.idle
print(controls.idle["top_p"])
controls.values = {"temperature": 0.8, "top_p": 7.0}
try:
    _ = controls.params
except InvalidRequestError as error:
    print(error)
assert list(controls.errors) == ["top_p"]
controls.undo()
assert not controls.errors

# %% [markdown]
# ## As code
#
# A setting that you like becomes a line of code, with only what differs from the defaults.

# %%
controls.values = {"temperature": 0.8, "top_p": 0.9, "top_k": 0}
print(controls.code())

# %% [markdown]
# ## The playground
#
# Prompt, sliders and text in one widget. Each token has the colour of its probability and shows
# what else could have stood there; a click on one of those goes on from it.

# %%
params = SamplingParams(temperature=0.8, seed=7, max_tokens=16)
playground = Playground(llm, STORY, params=params).run().wait(60)
first_text = playground.text

# %% tags=["varies"]
playground

# %% [markdown]
# What a click does can be done from code, too. Here the story goes on with another animal, and both
# are kept in a tree.

# %%
chosen = playground.result.outputs[0].token_ids[0]
alternatives = playground.result.outputs[0].logprobs[0]
other = next(token_id for token_id in alternatives if token_id != chosen)
playground.branch(0, other).wait(60)
print(first_text)
print(playground.text)

# %%
assert playground.text.startswith(alternatives[other].decoded_token)
tree = pd.DataFrame(playground.tree.rows())
assert (tree["parent"] == 0).sum() == 2  # two tokens follow the prompt

# %% [markdown]
# ## Give the memory back
#
# To play with the widgets, run the cells above and leave this one for later: without the model, the
# curve and the playground have nobody to ask.

# %%
llm.close()
