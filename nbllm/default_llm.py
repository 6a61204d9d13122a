"""The `LLM` that faces use when none is named."""

from __future__ import annotations

from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM, last_created_llm

_chosen: list[LLM] = []  # at most one; kept alive here
_demo: list[LLM] = []  # the one that was made because there was no other


def set_default_llm(llm: LLM | None) -> None:
    """Make `llm` what accessors and widgets use when none is named; None forgets the choice.

    Raises:
        InvalidRequestError: it is no `LLM`.
    """
    if llm is not None and not isinstance(llm, LLM):
        raise InvalidRequestError(f"llm must be an LLM, not {type(llm).__name__}", parameter="llm")
    _chosen[:] = [] if llm is None else [llm]


def default_llm() -> LLM:
    """The chosen one, else the open one that was made last, else the bundled demo model."""
    llm = _chosen[0] if _chosen else last_created_llm()
    if llm is None:
        llm = LLM()
        _demo[:] = [llm]
    return llm
