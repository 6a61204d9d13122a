"""SamplingParams: how to sample, validated when it is made.

Fields, defaults and rules are those of vLLM 0.22, with one deliberate change: `max_tokens` defaults
to None, which is "as much as fits", instead of 16.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbllm.checks import check_bias, check_bool, check_float, check_ids, check_int, check_list, fail

_GREEDY_BELOW = 1e-5  # temperatures under this are greedy
_MIN_TEMPERATURE = 0.01  # smaller ones would overflow the division
_MAX_N = 16384
_MOST = 1e6  # beyond, and below its inverse, 32 bits make infinities of some models' logits
_MAX_LOGPROB_TOKEN_IDS = 128


class RequestOutputKind(enum.Enum):
    """What a streamed item holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last item
    FINAL_ONLY = 2  # nothing before the end


@dataclass(slots=True)
class RepetitionDetectionParams:
    """Stop a text that ends in `min_count` copies of a pattern of so many tokens.

    Attributes:
        max_pattern_size: 0 switches the detection off.
        min_pattern_size: 0 means 1.
        min_count: at least 2, unless it is off.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            check_int(f"repetition_detection.{name}", getattr(self, name), minimum=0)
        if self.min_pattern_size > self.max_pattern_size:
            fail("repetition_detection", "min_pattern_size must not exceed max_pattern_size")
        if self.max_pattern_size > 0 and self.min_count < 2:
            fail("repetition_detection", "min_count must be at least 2")


@dataclass(slots=True)
class StructuredOutputsParams:
    """A constraint on the text: one of json, regex, choice, grammar, json_object, structural_tag.

    Attributes:
        json: a schema, also as text. Objects have the properties that it names, and others only
            where it speaks of them ("additionalProperties").
        regex, grammar: in Rust's syntax, of the whole text; in Lark's form or GBNF.
        structural_tag: JSON: schemas between tags in free text.
        disable_any_whitespace: JSON without blanks; else it may be on one line or indented.
        disable_additional_properties: accepted for compatibility.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        names = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        if sum(getattr(self, name) is not None for name in names) != 1:
            fail("structured_outputs", f"needs exactly one of {', '.join(names)}")
        if self.choice is not None:
            choices = check_list("structured_outputs", self.choice)
            if not choices or not all(isinstance(choice, str) for choice in choices):
                fail("structured_outputs", "choice must be a list of strings, not empty")
        if self.grammar is not None and not str(self.grammar).strip():
            fail("structured_outputs", "grammar must not be blank")


@dataclass(slots=True, repr=False)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
        n: continuations per prompt.
        presence_penalty: subtracted from the logit of every id in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        repetition_penalty: 1e-6 to 1e6; above 1 discourages ids of prompt and output.
        temperature: 0 to 1e6; 0 is greedy.
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
            -1 is all, True is 1, False is None.
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
        skip_clone: `clone()` may return the same object.
        routed_experts_prompt_start: accepted for compatibility.

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
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_clone: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    routed_experts_prompt_start: int = 0
    _verified: tuple[Any, ...] = dataclasses.field(
        default=(), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Check all fields, and bring those with several accepted forms to one.

        Done on construction, and again when a request is made of it, since fields can be set.

        Raises:
            InvalidRequestError: a value breaks its rule.
        """
        if self._verified and _ALL_FIELDS(self) == self._verified:
            return  # for a column of rows it would take as long as all else
        self._normalize_lists()
        self._check_lengths()
        self._check_numbers()
        self._check_types()
        if self.temperature < _GREEDY_BELOW:
            if self.n > 1:
                fail("n", f"must be 1 with greedy sampling (temperature 0), got {self.n}")
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
        self._verified = tuple(
            copy.copy(value) if isinstance(value, (list, dict)) else value
            for value in _ALL_FIELDS(self)
        )

    def __repr__(self) -> str:
        default: dict[str, list[str]] = {"stop": [], "stop_token_ids": [], "bad_words": []}
        changed = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.repr and getattr(self, field.name) != default.get(field.name, field.default)
        )
        return f"SamplingParams({', '.join(changed)})"

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """Like the constructor, but None means the default."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any]) -> SamplingParams:
        """The sampling that a model's generation_config.json recommends.

        As in vLLM, what it does not mention has its default, so that a file without a word about
        sampling means temperature 1, whatever its `do_sample`.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {n: generation_config[n] for n in names if generation_config.get(n) is not None}
        if generation_config.get("max_new_tokens") is not None:
            values["max_tokens"] = generation_config["max_new_tokens"]
        return cls(**values)

    def clone(self, **changes: Any) -> SamplingParams:
        """A deep copy, with some fields changed; itself with `skip_clone` and no changes."""
        if self.skip_clone and not changes:
            return self
        return dataclasses.replace(copy.deepcopy(self), **changes)

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0

    def _normalize_lists(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else check_list("stop", self.stop)
        self.bad_words = check_list("bad_words", self.bad_words)
        for name, texts in (("stop", self.stop), ("bad_words", self.bad_words)):
            for text in texts:
                if not isinstance(text, str) or (not text.strip() and name == "bad_words"):
                    fail(name, f"must hold non-blank strings, got {text!r}")
                if not text:
                    fail(name, "must not hold an empty string")
        if self.stop and not self.detokenize:
            fail("stop", "strings need detokenize=True")
        self.stop_token_ids = check_ids("stop_token_ids", self.stop_token_ids)
        for name in ("allowed_token_ids", "logprob_token_ids"):
            if getattr(self, name) is not None:
                setattr(self, name, check_ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            fail("allowed_token_ids", "must not be empty")
        if self.logit_bias is not None:
            self.logit_bias = check_bias("logit_bias", self.logit_bias)

    def _check_lengths(self) -> None:
        check_int("n", self.n, minimum=1, maximum=_MAX_N)
        if self.seed is not None:
            self.seed = check_int("seed", self.seed)
            if self.seed == -1:
                self.seed = None
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, minimum=1)
        check_int("min_tokens", self.min_tokens, minimum=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            fail(
                "min_tokens", f"must not exceed max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                setattr(self, name, 1 if value else None)
            elif value is not None:
                check_int(name, value, minimum=-1)
        if self.logprob_token_ids is not None:
            count = len(self.logprob_token_ids)
            if count > _MAX_LOGPROB_TOKEN_IDS:
                fail("logprob_token_ids", f"holds at most {_MAX_LOGPROB_TOKEN_IDS}, got {count}")
            if self.logprobs is not None and self.logprobs != count:
                fail("logprob_token_ids", f"and logprobs must agree: {count}, {self.logprobs}")

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            check_float(name, getattr(self, name), minimum=-2.0, maximum=2.0)
        check_float("repetition_penalty", self.repetition_penalty, minimum=1 / _MOST, maximum=_MOST)
        check_float("temperature", self.temperature, minimum=0.0, maximum=_MOST)
        if _GREEDY_BELOW <= self.temperature < _MIN_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature} is raised to {_MIN_TEMPERATURE}: smaller ones "
                "overflow; use 0 for greedy sampling",
                stacklevel=5,
            )
            self.temperature = _MIN_TEMPERATURE
        if not 0.0 < check_float("top_p", self.top_p) <= 1.0:
            fail("top_p", f"must be in (0, 1], got {self.top_p}")
        if check_int("top_k", self.top_k, minimum=-1) == -1:
            self.top_k = 0
        check_float("min_p", self.min_p, minimum=0.0, maximum=1.0)

    def _check_types(self) -> None:
        for name in _BOOLS:
            setattr(self, name, check_bool(name, getattr(self, name)))
        if self.skip_reading_prefix_cache is not None:
            check_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                fail(name, f"must be of type {kind.__name__}, got {value!r:.200}")
        if self.output_kind is None:
            fail("output_kind", "must be a RequestOutputKind")
        if self.thinking_token_budget is not None:
            if check_int("thinking_token_budget", self.thinking_token_budget, minimum=-1) == -1:
                self.thinking_token_budget = None
        check_int("routed_experts_prompt_start", self.routed_experts_prompt_start, minimum=0)


_ALL_FIELDS = operator.attrgetter(
    *(field.name for field in dataclasses.fields(SamplingParams) if field.init)
)
_BOOLS = (
    "ignore_eos",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_clone",
)
_TYPES: dict[str, type] = {
    "output_kind": RequestOutputKind,
    "structured_outputs": StructuredOutputsParams,
    "repetition_detection": RepetitionDetectionParams,
    "extra_args": dict,
}


@dataclass(slots=True)
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
        check_int("beam_width", self.beam_width, minimum=1)
        check_int("max_tokens", self.max_tokens, minimum=1)
        check_float("temperature", self.temperature, minimum=0.0)
        check_float("length_penalty", self.length_penalty)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
