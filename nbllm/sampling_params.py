"""SamplingParams: how to sample, validated when it is made.

Fields, defaults and rules are those of vLLM 0.22, with one deliberate change: `max_tokens` defaults
to None, which is "as much as fits", instead of 16.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from nbllm.errors import InvalidRequestError

_GREEDY_BELOW = 1e-5  # temperatures under this are greedy
_MIN_TEMPERATURE = 0.01  # smaller ones would overflow the division
_MAX_N = 16384
_MAX_LOGPROB_TOKEN_IDS = 128


class RequestOutputKind(enum.Enum):
    """What a streamed item holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last item
    FINAL_ONLY = 2  # nothing before the end


@dataclass(slots=True, kw_only=True)
class RepetitionDetectionParams:
    """Stop a text that repeats itself: `min_count` copies of a pattern of that many tokens."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            _check_int(f"repetition_detection.{name}", getattr(self, name), minimum=0)
        if self.min_pattern_size > self.max_pattern_size:
            raise InvalidRequestError(
                "repetition_detection.min_pattern_size must not exceed max_pattern_size",
                parameter="repetition_detection",
            )
        if self.max_pattern_size > 0 and self.min_count < 2:
            raise InvalidRequestError(
                "repetition_detection.min_count must be at least 2",
                parameter="repetition_detection",
            )


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """A constraint on the generated text: exactly one of the first six fields."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        constraints = (
            self.json,
            self.regex,
            self.choice,
            self.grammar,
            self.json_object,
            self.structural_tag,
        )
        if sum(constraint is not None for constraint in constraints) != 1:
            raise InvalidRequestError(
                "structured_outputs needs exactly one of json, regex, choice, grammar, "
                "json_object, structural_tag",
                parameter="structured_outputs",
            )
        if self.choice is not None and not self.choice:
            raise InvalidRequestError(
                "structured_outputs.choice must not be empty", parameter="structured_outputs"
            )
        if self.grammar is not None and not self.grammar.strip():
            raise InvalidRequestError(
                "structured_outputs.grammar must not be blank", parameter="structured_outputs"
            )


@dataclass(slots=True, kw_only=True, repr=False)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
        n: continuations per prompt.
        presence_penalty: subtracted from the logit of every id in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        repetition_penalty: > 0; above 1 discourages ids of prompt and output.
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1]; sample from the smallest set of ids that has this probability.
        top_k: sample from the k most likely ids; 0 or -1 is all.
        min_p: in [0, 1]; drop ids less likely than this share of the most likely one.
        seed: the same seed gives the same text, whatever else runs; None draws one.
        stop: strings that end the text; the text is cut before them.
        stop_token_ids: ids that end it.
        bad_words: words that may not occur.
        include_stop_str_in_output: keep the stop string or token in the text.
        ignore_eos: go on past end-of-sequence.
        max_tokens: most tokens to generate; None is as many as fit.
        min_tokens: least tokens to generate before end-of-sequence or stops count.
        logprobs: report the log-probabilities of the chosen and this many most likely tokens;
            -1 is all.
        prompt_logprobs: the same for the prompt's tokens.
        logprob_token_ids: report these ids instead of the most likely ones.
        flat_logprobs: accepted for compatibility; logprobs are always dicts.
        detokenize: make text; False leaves `text` empty.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: accepted for compatibility.
        logit_bias: id -> number added to its logit, clamped to [-100, 100].
        allowed_token_ids: sample from these only.
        structured_outputs: a grammar or schema for the text.
        output_kind: what streamed items hold.
        repetition_detection: end texts that repeat themselves.
        thinking_token_budget: bound on reasoning tokens.
        skip_reading_prefix_cache: compute the whole prompt.
        extra_args: for plugins; not interpreted.

    Raises:
        InvalidRequestError: a value breaks its rule; `.parameter` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    repetition_detection: RepetitionDetectionParams | None = None
    thinking_token_budget: int | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_numbers()
        self._check_lengths()
        self._check_lists()
        if self.temperature < _GREEDY_BELOW:
            if self.n > 1:
                _fail("n", f"n must be 1 with greedy sampling (temperature 0), got {self.n}")
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0

    def __repr__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"SamplingParams({', '.join(changed)})"

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """Like the constructor, but None means the default."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any]) -> SamplingParams:
        """The sampling that a model's generation_config.json recommends.

        `do_sample: false`, or no word about sampling, leaves vLLM's defaults (temperature 1).
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {n: generation_config[n] for n in names if generation_config.get(n) is not None}
        if generation_config.get("max_new_tokens") is not None:
            values["max_tokens"] = generation_config["max_new_tokens"]
        return cls(**values)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy, with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0

    def _normalize(self) -> None:
        """Bring the several accepted spellings of a value to one."""
        if self.seed == -1:
            self.seed = None
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                setattr(self, name, 1)
        if self.top_k == -1:
            self.top_k = 0
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                _fail("logit_bias", "logit_bias must be a dict of token id -> number")
            self.logit_bias = {
                _check_int("logit_bias", int(token_id) if _is_digits(token_id) else token_id): min(
                    100.0, max(-100.0, _check_float("logit_bias", value))
                )
                for token_id, value in self.logit_bias.items()
            }

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _check_float(name, getattr(self, name), minimum=-2.0, maximum=2.0)
        if _check_float("repetition_penalty", self.repetition_penalty) <= 0.0:
            _fail("repetition_penalty", f"must be above 0, got {self.repetition_penalty}")
        _check_float("temperature", self.temperature, minimum=0.0)
        if _GREEDY_BELOW <= self.temperature < _MIN_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature} is raised to {_MIN_TEMPERATURE}: smaller ones "
                "overflow; use 0 for greedy sampling",
                stacklevel=4,
            )
            self.temperature = _MIN_TEMPERATURE
        if not 0.0 < _check_float("top_p", self.top_p) <= 1.0:
            _fail("top_p", f"must be in (0, 1], got {self.top_p}")
        _check_int("top_k", self.top_k, minimum=0)
        _check_float("min_p", self.min_p, minimum=0.0, maximum=1.0)

    def _check_lengths(self) -> None:
        _check_int("n", self.n, minimum=1, maximum=_MAX_N)
        if self.seed is not None:
            _check_int("seed", self.seed)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, minimum=1)
        _check_int("min_tokens", self.min_tokens, minimum=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail(
                "min_tokens",
                f"must not exceed max_tokens={self.max_tokens}, got {self.min_tokens}",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, minimum=-1)
        if self.thinking_token_budget is not None:
            _check_int("thinking_token_budget", self.thinking_token_budget, minimum=0)

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            for text in getattr(self, name) or ():
                if not isinstance(text, str) or not text:
                    _fail(name, f"must hold non-empty strings, got {text!r}")
        if self.stop and not self.detokenize:
            _fail("stop", "stop strings need detokenize=True")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            for token_id in getattr(self, name) or ():
                _check_int(name, token_id)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _fail("allowed_token_ids", "must not be empty")
        if self.logprob_token_ids is not None:
            count = len(self.logprob_token_ids)
            if count > _MAX_LOGPROB_TOKEN_IDS:
                _fail("logprob_token_ids", f"at most {_MAX_LOGPROB_TOKEN_IDS}, got {count}")
            if self.logprobs is not None and self.logprobs != count:
                _fail("logprob_token_ids", "logprobs must be None or their number")


@dataclass(slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: the `beam_width` most probable texts.

    Raises:
        InvalidRequestError: a value breaks its rule.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int("beam_width", self.beam_width, minimum=1)
        _check_int("max_tokens", self.max_tokens, minimum=1)
        _check_float("temperature", self.temperature, minimum=0.0)
        _check_float("length_penalty", self.length_penalty)


def _fail(parameter: str, rule: str) -> NoReturn:
    message = rule if rule.startswith((parameter, "stop strings")) else f"{parameter} {rule}"
    raise InvalidRequestError(message, parameter=parameter)


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and value.isdigit()  # JSON has no other keys


def _check_int(
    parameter: str, value: Any, *, minimum: int | None = None, maximum: int | None = None
) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        _fail(parameter, f"must be an integer, got {value!r}")
    number = int(value)
    if minimum is not None and number < minimum:
        _fail(parameter, f"must be at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        _fail(parameter, f"must be at most {maximum}, got {number}")
    return number


def _check_float(
    parameter: str, value: Any, *, minimum: float | None = None, maximum: float | None = None
) -> float:
    try:
        number = float(value) if not isinstance(value, (bool, str)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):  # NaN would pass every comparison below
        _fail(parameter, f"must be a finite number, got {value!r}")
    if minimum is not None and number < minimum:
        _fail(parameter, f"must be at least {minimum:g}, got {number:g}")
    if maximum is not None and number > maximum:
        _fail(parameter, f"must be at most {maximum:g}, got {number:g}")
    return number
