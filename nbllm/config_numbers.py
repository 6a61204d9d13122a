"""Numbers of a config.json, which somebody else wrote. All of these raise ValueError."""

from __future__ import annotations

import math
from typing import Any

# Far beyond any model there is: what is larger is an error or an attack, and must not come to the
# point where memory is allocated or layers are counted.
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**26,
    "word_embed_proj_dim": 2**18,
    "sliding_window": 2**62,
    "local_attention": 2**62,
    "global_attn_every_n_layers": 2**10,
    "type_vocab_size": 2**10,
}


def positive(value: Any, name: str) -> int:
    """An integer from 1 to the limit of its name."""
    if type(value) is not int or not 1 <= value <= _LIMITS[name]:
        raise ValueError(f"{name} is {short(value)}, not an integer in [1, {_LIMITS[name]}]")
    return value


def positive_float(value: Any, name: str) -> float:
    """A finite number above zero, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {short(value)}, not a number")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {short(value)}, not a positive number")
    return float(value)


def optional_float(raw: dict[str, Any], name: str) -> float | None:
    """The same of an entry that may be missing or null: None."""
    return None if raw.get(name) is None else positive_float(raw[name], name)


def short(value: Any) -> str:
    """What a value looks like, of a length that fits in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
