"""What a playground compares: models and parameters, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM
from nbllm.sampling_params import SamplingParams
from nbllm.widgets.lane import Lane, Override

Compared = SamplingParams | Mapping[str, Any] | LLM | tuple[LLM, Override]
"""All parameters, some of them, another model, or another model with parameters."""


def make_lanes(compare: Iterable[Compared] | Mapping[str, Compared] | None) -> list[Lane]:
    """The lanes of a playground; one that has nothing of its own if there is nothing to compare.

    Args:
        compare: by title, or without titles, which are then made.

    Raises:
        InvalidRequestError: one is of another type, or there are none.
    """
    if compare is None:
        return [Lane("")]
    if isinstance(compare, Mapping):
        lanes = [_make_lane(value, str(title)) for title, value in compare.items()]
    elif isinstance(compare, Iterable) and not isinstance(compare, str):
        lanes = [_make_lane(value, None) for value in compare]
    else:
        raise InvalidRequestError("compare must be a list or dict", parameter="compare")
    if not lanes:
        raise InvalidRequestError("compare has nothing in it", parameter="compare")
    return lanes


def _make_lane(value: Any, title: str | None) -> Lane:
    llm, override = value if isinstance(value, tuple) and len(value) == 2 else (None, value)
    if llm is None and isinstance(override, LLM):
        llm, override = override, None
    if not isinstance(llm, LLM | None) or not isinstance(override, SamplingParams | Mapping | None):
        raise InvalidRequestError(
            "compare takes SamplingParams, dicts of their fields, LLMs and pairs of these, "
            f"got {value!r:.200}",
            parameter="compare",
        )
    names = [] if llm is None else [llm.model_name]
    if isinstance(override, SamplingParams):
        names.append(repr(override).removeprefix("SamplingParams(").removesuffix(")") or "defaults")
    elif override is not None:
        names.append(", ".join(f"{name}={value!r}" for name, value in override.items()))
    return Lane(title if title is not None else ", ".join(names), llm, override)
