"""SamplingControls: what the sliders show is what is sampled with."""

from __future__ import annotations

import pytest

from nbllm import LLM, InvalidRequestError, SamplingControls, SamplingParams


def test_the_controls_show_the_parameters_they_came_with() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        max_tokens=50,
        seed=3,
        stop=["a", "b"],
        presence_penalty=0.5,
    )
    assert SamplingControls(params).params == params


def test_a_moved_slider_changes_the_parameters() -> None:
    controls = SamplingControls()
    controls.temperature.value = 0.3
    controls.seed.value = "11"
    controls.stop.value = "END\n\n"
    controls.max_tokens.value = 0
    params = controls.params
    assert (params.temperature, params.seed, params.max_tokens) == (0.3, 11, None)
    assert params.stop == ["END"]


def test_filters_are_greyed_out_when_sampling_is_greedy() -> None:
    controls = SamplingControls()
    assert not controls.top_p.disabled
    controls.temperature.value = 0.0
    assert controls.top_p.disabled and controls.seed.disabled


def test_a_seed_that_is_no_number_is_shown_and_raised() -> None:
    controls = SamplingControls()
    controls.seed.value = "<x>"
    assert "&lt;x>" in controls._message.value
    with pytest.raises(InvalidRequestError, match="seed must be an integer"):
        _ = controls.params
    controls.seed.value = "5"
    assert controls._message.value == ""


def test_the_parameters_go_into_a_call() -> None:
    controls = SamplingControls(SamplingParams(temperature=0.0, max_tokens=8))
    with LLM(device="cpu") as llm:
        output = llm.generate("What is 17 + 25?", controls.params)[0]
    assert output.outputs[0].text.strip() == "42"
