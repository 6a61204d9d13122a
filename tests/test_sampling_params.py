"""SamplingParams: the rules of each field, at their boundaries."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest

from nbllm import (
    BeamSearchParams,
    InvalidRequestError,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": None,  # vLLM: 16
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "skip_clone": False,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "extra_args": None,
    "bad_words": [],
    "skip_reading_prefix_cache": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "routed_experts_prompt_start": 0,
}

# field: (values that are accepted, values that are not)
RULES: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 2, 16384], [0, -1, 16385, 1.0, "1", True, None]),
    "presence_penalty": ([-2, -2.0, 0, 2.0], [-2.01, 2.01]),
    "frequency_penalty": ([-2.0, 0, 2], [-2.01, 2.01]),
    "repetition_penalty": ([1e-6, 1, 100.0], [0, 0.0, -1.0]),
    "temperature": ([0, 0.01, 1, 2.5, 100.0], [-0.1, -1e-9]),
    "top_p": ([1e-6, 0.5, 1, 1.0], [0, 0.0, 1.001, -0.5]),
    "top_k": ([-1, 0, 1, 10**6, np.int64(3)], [-2, 1.0, 0.5, True, "3", None]),
    "min_p": ([0, 0.0, 0.5, 1.0], [-0.01, 1.01]),
    "seed": ([None, -1, 0, 7, 2**64, -5], [1.5, "7", True]),
    "stop": ([None, "x", ["x"], ("x", "y"), []], ["", [""], [1], 5, ["a", None], {"a": 1}]),
    "stop_token_ids": ([None, [], [1, 2], (3,), {4}], [5, ["1"], [1.0], [True], "12", [-1]]),
    "bad_words": ([None, [], ["no"]], ["no", [""], [3]]),
    "max_tokens": ([None, 1, 10**9], [0, -1, 1.5, "5", True]),
    "min_tokens": ([0, 5], [-1, 1.5, None, True]),
    "logprobs": ([None, 0, 5, -1, True, False], [-2, 1.5, "1"]),
    "prompt_logprobs": ([None, 0, 5, -1, True, False], [-2, 1.5, "1"]),
    "logprob_token_ids": ([None, [], list(range(128))], [list(range(129)), 5, ["a"], [-1]]),
    "logit_bias": (
        [None, {}, {1: 2.0}, {"17": -3}, {np.int64(2): 1}],
        [{1: math.nan}, {1: math.inf}, {1.5: 1.0}, {"x": 1.0}, {-1: 1.0}, {"²": 1}, [1], {1: "2"}],
    ),
    "allowed_token_ids": ([None, [1], (1, 2)], [[], [-1], ["a"], 1, [1.0]]),
    "structured_outputs": ([None, StructuredOutputsParams(regex="a")], ["a", {"regex": "a"}]),
    "repetition_detection": ([None, RepetitionDetectionParams(3, 1, 2)], [3, {"min_count": 2}]),
    "output_kind": (list(RequestOutputKind), [None, 2, "DELTA"]),
    "extra_args": ([None, {"a": 1}], [[1], "a"]),
    "thinking_token_budget": ([None, 0, 5, -1], [-2, 1.5, True]),
    "skip_reading_prefix_cache": ([None, True, False], ["no", 1]),
    "routed_experts_prompt_start": ([0, 4], [-1, 0.5]),
}
BOOLS = [
    "ignore_eos",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_clone",
]
FLOATS = [
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
]


def test_every_field_has_its_default() -> None:
    params = SamplingParams()
    names = [field.name for field in dataclasses.fields(params) if field.init]
    assert {name: getattr(params, name) for name in names} == DEFAULTS


def test_every_field_is_covered_by_the_tables() -> None:
    assert {*RULES, *BOOLS} == set(DEFAULTS)


@pytest.mark.parametrize("name", RULES)
def test_a_field_takes_what_its_rule_allows(name: str) -> None:
    for value in RULES[name][0]:
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", RULES)
def test_a_field_refuses_the_rest_and_is_named(name: str) -> None:
    for value in RULES[name][1]:
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.parameter == name, value
        assert name in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", None, True, [1.0]])
def test_a_number_must_be_finite(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize("name", BOOLS)
def test_a_switch_is_true_or_false(name: str) -> None:
    for value in (True, False, np.True_):
        assert getattr(SamplingParams(**{name: value}), name) is bool(value)
    for bad in ("false", 1, 0, None):
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: bad})
        assert caught.value.parameter == name


def test_an_invalid_value_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        SamplingParams(top_p=2)


def test_several_spellings_become_one() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="x").stop == ["x"]
    assert SamplingParams(stop=("x", "y")).stop == ["x", "y"]
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(prompt_logprobs=False).prompt_logprobs is None
    assert SamplingParams(logit_bias={"5": 200, 6: -200.0}).logit_bias == {5: 100.0, 6: -100.0}
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None


def test_temperature_zero_is_greedy_and_ignores_filters() -> None:
    for temperature in (0, 0.0, 9e-6):
        params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.1)
        assert params.is_greedy
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


def test_a_tiny_temperature_is_raised_with_a_warning_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="raised to 0.01") as caught:
        assert SamplingParams(temperature=1e-5).temperature == 0.01
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingParams(temperature=0.01)


def test_greedy_has_one_continuation() -> None:
    with pytest.raises(InvalidRequestError, match="greedy"):
        SamplingParams(n=2, temperature=0)


def test_fields_must_agree() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(InvalidRequestError, match="max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)
    SamplingParams(logprob_token_ids=[1, 2], logprobs=2)
    with pytest.raises(InvalidRequestError, match="agree"):
        SamplingParams(logprob_token_ids=[1, 2], logprobs=3)


def test_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_a_field_set_later_is_checked_when_it_is_used() -> None:
    params = SamplingParams()
    params.temperature = math.nan
    with pytest.raises(InvalidRequestError, match="temperature"):
        params.verify()
    params.temperature = 0
    params.stop = "x"
    params.verify()
    assert params.is_greedy and params.stop == ["x"]


def test_a_clone_shares_nothing() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 1.0})
    clone = params.clone()
    assert clone == params
    assert isinstance(clone.stop, list)
    clone.stop.append("b")
    assert params.stop == ["a"]
    assert params.clone(temperature=0.5).temperature == 0.5
    with pytest.raises(InvalidRequestError):
        params.clone(top_p=3)
    shared = SamplingParams(skip_clone=True)
    assert shared.clone() is shared
    assert shared.clone(top_k=2) is not shared


def test_from_optional_takes_none_for_the_default() -> None:
    params = SamplingParams.from_optional(n=None, temperature=None, top_p=0.5, logit_bias={3: 1e6})
    assert params == SamplingParams(top_p=0.5, logit_bias={3: 100})


def test_generation_config_gives_the_defaults() -> None:
    recommended = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 9, "do_sample": True, "x": 1}
    params = SamplingParams.from_generation_config(recommended)
    assert params == SamplingParams(temperature=0.6, top_k=20, max_tokens=9)
    assert SamplingParams.from_generation_config({"temperature": None}) == SamplingParams()


def test_repr_says_what_was_changed() -> None:
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(top_p=0.5, stop="x")) == "SamplingParams(top_p=0.5, stop=['x'])"


def test_repetition_detection_has_rules() -> None:
    RepetitionDetectionParams()
    RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=4, min_count=2)
    for bad in ((-1, 0, 2), (2, 3, 2), (2, 1, 1), (2, -1, 2), (1.5, 1, 2)):
        with pytest.raises(InvalidRequestError) as caught:
            RepetitionDetectionParams(*bad)  # type: ignore[arg-type]
        assert "repetition_detection" in str(caught.value)


def test_structured_outputs_are_exactly_one_constraint() -> None:
    for good in ({"json": {}}, {"regex": "a"}, {"choice": ["a"]}, {"json_object": True}):
        StructuredOutputsParams(**good)
    bads: list[dict[str, Any]] = [
        {},
        {"json": {}, "regex": "a"},
        {"choice": []},
        {"choice": "ab"},
        {"choice": [1]},
        {"grammar": " \n"},
    ]
    for bad in bads:
        with pytest.raises(InvalidRequestError):
            StructuredOutputsParams(**bad)


def test_beam_search_params_have_rules() -> None:
    params = BeamSearchParams(4, 16)
    assert (params.beam_width, params.max_tokens, params.ignore_eos) == (4, 16, False)
    assert (params.temperature, params.length_penalty) == (0.0, 1.0)
    assert params.include_stop_str_in_output is False
    bads: list[dict[str, Any]] = [
        {"beam_width": 0},
        {"beam_width": 1.5},
        {"max_tokens": 0},
        {"max_tokens": None},
        {"temperature": -1},
        {"temperature": math.nan},
        {"length_penalty": math.inf},
        {"ignore_eos": "no"},
    ]
    for bad in bads:
        with pytest.raises(InvalidRequestError) as caught:
            BeamSearchParams(**({"beam_width": 2, "max_tokens": 3} | bad))
        assert caught.value.parameter in bad
