"""PoolingParams: which vector stands for a prompt, validated when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nbllm.checks import check_bool, check_int, fail

_POOLINGS = ("cls", "last", "mean")


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How the hidden states of a prompt become one vector.

    They are those after the final norm, what transformers calls `last_hidden_state`.

    Attributes:
        pooling: "last" is that of the last token, which a decoder's attention lets see all others;
            "cls" that of the first, which an encoder puts before the text for this purpose; "mean"
            is the mean over all tokens. None is what the model was made for, see
            `LLM.get_default_pooling_params`.
        normalize: divide by the Euclidean norm, after the cut to `dimensions`; None likewise.
        dimensions: keep the first ones only, for models that were trained so that these suffice
            (Matryoshka); None keeps all.
        use_activation: vLLM's name of `normalize`; None is to go by that.

    Raises:
        InvalidRequestError: a value breaks its rule.
    """

    pooling: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in _POOLINGS:
            fail("pooling", f"must be one of {', '.join(_POOLINGS)}, got {self.pooling!r:.100}")
        normalize = self.normalize
        if normalize is not None:
            normalize = check_bool("normalize", normalize)
        if self.use_activation is not None:
            normalize = check_bool("use_activation", self.use_activation)
        object.__setattr__(self, "normalize", normalize)
        if self.dimensions is not None:
            number = check_int("dimensions", self.dimensions, minimum=1)
            object.__setattr__(self, "dimensions", number)

    def or_default(self, default: PoolingParams) -> PoolingParams:
        """The same, with what is None from `default`."""
        return replace(
            self,
            pooling=default.pooling if self.pooling is None else self.pooling,
            normalize=default.normalize if self.normalize is None else self.normalize,
        )
