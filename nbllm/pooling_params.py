"""PoolingParams: which vector stands for a prompt, validated when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from nbllm.checks import check_bool, check_int, fail

_POOLINGS = ("last", "mean")


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How the hidden states of a prompt become one vector.

    They are those after the final norm, what transformers calls `last_hidden_state`.

    Attributes:
        pooling: "last" is that of the last token, which a decoder's attention lets see all others;
            "mean" is the mean over all tokens.
        normalize: divide by the Euclidean norm, after the cut to `dimensions`.
        dimensions: keep the first ones only, for models that were trained so that these suffice
            (Matryoshka); None keeps all.
        use_activation: vLLM's name of `normalize`; None is to go by that.

    Raises:
        InvalidRequestError: a value breaks its rule.
    """

    pooling: str = "last"
    normalize: bool = True
    dimensions: int | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        if self.pooling not in _POOLINGS:
            fail("pooling", f"must be one of {', '.join(_POOLINGS)}, got {self.pooling!r:.100}")
        normalize = check_bool("normalize", self.normalize)
        if self.use_activation is not None:
            normalize = check_bool("use_activation", self.use_activation)
        object.__setattr__(self, "normalize", normalize)
        if self.dimensions is not None:
            number = check_int("dimensions", self.dimensions, minimum=1)
            object.__setattr__(self, "dimensions", number)
