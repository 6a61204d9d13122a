"""SamplingControls: what the controls show is what is sampled with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import nbllm
from nbllm import LLM, InvalidRequestError, RequestOutputKind, SamplingControls, SamplingParams
from nbllm.widgets.next_token_curve import NextTokenCurve, curve_svg, curve_text
from nbllm_kernels.reference import filter_logits

PROMPT = "Once upon a time"
PARAMS = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    repetition_penalty=1.1,
    max_tokens=50,
    min_tokens=2,
    seed=3,
    stop=["a", "b"],
    presence_penalty=0.5,
    n=2,
    logprobs=4,
    ignore_eos=True,
    bad_words=["Rome"],
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32") as llm:
        yield llm


def from_view(controls: SamplingControls, **changes: Any) -> None:
    """What a browser sends when somebody turns a control."""
    gesture = {"gesture": changes.pop("gesture")} if "gesture" in changes else {}
    controls.set_state({**gesture, "values": {**controls.values, **changes}})


def test_the_controls_show_the_parameters_they_came_with() -> None:
    assert SamplingControls(PARAMS).params == PARAMS
    assert SamplingControls().params == SamplingParams(max_tokens=256)


def test_a_moved_slider_changes_the_parameters() -> None:
    controls = SamplingControls(PARAMS)
    from_view(controls, temperature=0.3, seed="11", stop=["END"], max_tokens=None, n=1)
    params = controls.params
    assert (params.temperature, params.seed, params.max_tokens, params.n) == (0.3, 11, None, 1)
    assert params.stop == ["END"]
    assert params.bad_words == ["Rome"]  # what has no control stays
    controls.values = {"top_p": 0.5}
    assert (controls.params.top_p, controls.params.temperature) == (0.5, 0.3)


def test_seeds_of_any_length_go_through_the_browser_as_they_are() -> None:
    seed = 2**63 + 5
    controls = SamplingControls(SamplingParams(seed=seed))
    assert controls.values["seed"] == str(seed)
    from_view(controls, temperature=0.5)
    assert controls.params.seed == seed
    from_view(controls, seed=None)
    assert controls.params.seed is None


def test_each_valid_change_is_told_once() -> None:
    controls = SamplingControls()
    seen: list[SamplingParams] = []
    controls.observe(lambda change: seen.append(change["new"]), names="params")
    from_view(controls, temperature=0.3)
    from_view(controls, temperature=-1.0)
    from_view(controls, temperature=0.4)
    controls.params = SamplingParams(temperature=0.9)
    assert [params.temperature for params in seen] == [0.3, 0.4, 0.9]
    assert controls.values["temperature"] == 0.9


def test_a_change_of_what_was_read_changes_no_control() -> None:
    controls = SamplingControls()
    controls.params.temperature = 0.1
    assert controls.params.temperature == 1.0


def test_what_has_no_effect_is_greyed_out_and_kept() -> None:
    controls = SamplingControls(SamplingParams(top_p=0.9, seed=4))
    assert controls.idle == {}
    from_view(controls, temperature=0)
    assert set(controls.idle) == {"top_p", "top_k", "min_p", "seed"}
    assert "temperature 0" in controls.idle["top_p"]
    assert controls.params == SamplingParams(temperature=0, max_tokens=None, seed=4)
    from_view(controls, temperature=1.0)
    assert controls.params.top_p == 0.9 and controls.idle == {}
    from_view(controls, temperature=0.0, seed="x")
    assert "seed" in controls.errors and "seed" not in controls.idle  # it can be mended
    from_view(controls, temperature=1.0, seed=None, top_k=1)
    assert "top_p" in controls.idle and "top_k" not in controls.idle


def test_every_wrong_value_is_shown_beside_its_control_and_raised() -> None:
    controls = SamplingControls()
    from_view(controls, seed="<x>", top_p=0, max_tokens=2.5)
    assert set(controls.errors) == {"seed", "top_p", "max_tokens"}
    assert "seed must be an integer" in controls.errors["seed"]
    with pytest.raises(InvalidRequestError) as error:
        _ = controls.params
    assert error.value.parameter in controls.errors
    assert controls.code_text == ""
    assert "&lt;x&gt;" in (controls.static_html() or "") and "top_p" in controls.static_text()
    from_view(controls, seed="5", top_p=0.5, max_tokens=2)
    assert controls.errors == {} and controls.params.seed == 5


def test_controls_that_contradict_each_other_say_so() -> None:
    controls = SamplingControls()
    from_view(controls, temperature=0.0, n=3, max_tokens=4, min_tokens=5)
    assert set(controls.errors) == {"n", "min_tokens"}
    with pytest.raises(InvalidRequestError, match="no control for 'top_q'"):
        controls.values = {"top_q": 1}
    assert set(controls.errors) == {"n", "min_tokens"}


def test_undo_and_redo_go_through_the_history() -> None:
    controls = SamplingControls()
    for temperature in (0.1, 0.2, 0.3):
        from_view(controls, temperature=temperature)
    for expected in (0.2, 0.1, 1.0, 1.0):
        controls._handle_custom_msg({"type": "undo"}, [])
        assert controls.params.temperature == expected
    assert not controls.can_undo and controls.can_redo
    controls._handle_custom_msg({"type": "redo"}, [])
    assert controls.params.temperature == 0.1
    controls.params = SamplingParams(temperature=0.9)
    assert not controls.can_redo  # another way was taken
    controls.undo()
    assert controls.params.temperature == 0.1


def test_a_slider_that_is_dragged_is_one_step_of_the_history() -> None:
    controls = SamplingControls()
    for temperature in (0.9, 0.8, 0.7):
        from_view(controls, temperature=temperature, gesture=1)
    for temperature in (0.6, 0.5):
        from_view(controls, temperature=temperature, gesture=2)
    controls.values = {"temperature": 0.4}  # by a program
    controls.undo()
    assert controls.params.temperature == 0.5
    controls.undo()
    assert controls.params.temperature == 0.7
    controls.undo()
    assert controls.params.temperature == 1.0 and not controls.can_undo


def test_presets_change_what_shapes_the_distribution_and_nothing_else(llm: LLM) -> None:
    controls = SamplingControls(SamplingParams(top_k=3, max_tokens=9, seed=1), llm)
    assert list(controls.presets) == ["precise", "balanced", "creative", "model's default"]
    controls._handle_custom_msg({"type": "preset", "name": "balanced"}, [])
    assert controls.params == SamplingParams(temperature=0.7, top_p=0.95, max_tokens=9, seed=1)
    controls.apply_preset("precise")
    assert controls.params.is_greedy
    controls.apply_preset("model's default")
    own = llm.get_default_sampling_params()
    assert controls.params == own.clone(max_tokens=9, seed=1)
    with pytest.raises(InvalidRequestError, match="no preset 'wild'"):
        controls.apply_preset("wild")


def test_the_code_makes_the_same_parameters_and_runs(llm: LLM) -> None:
    params = PARAMS.clone(n=1, output_kind=RequestOutputKind.DELTA)
    controls = SamplingControls(params)
    assert controls.code() == controls.code_text
    made: dict[str, Any] = {}
    exec(controls.code().split("df.llm")[0], made)
    assert made["sampling_params"] == params

    controls = SamplingControls(SamplingParams(temperature=0, max_tokens=3))
    assert "SamplingParams(temperature=0.0, max_tokens=3)" in controls.code()
    nbllm.set_default_llm(llm)
    try:
        lines = controls.code().replace("df.llm", "frame = df.llm")
        made = {"df": pd.DataFrame({"prompt": [PROMPT]})}
        exec(lines, made)
    finally:
        nbllm.set_default_llm(None)
    assert made["frame"]["llm"].str.len().item() > 0


def test_the_parameters_go_into_a_call(llm: LLM) -> None:
    controls = SamplingControls(SamplingParams(temperature=0.0, max_tokens=8))
    output = llm.generate("What is 17 + 25?", controls.params)[0]
    assert output.outputs[0].text.strip() == "42"


CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_p": 0.8},
    {"top_k": 5},
    {"top_k": 1},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_p": 0.9, "top_k": 12, "min_p": 0.01},
    {"temperature": 0.6, "top_p": 0.05},
]


def by_torch(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What the sampler draws from, by the kernels' own reference."""
    if params.is_greedy:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    scaled = (logits / params.temperature)[None]
    top_k, top_p, min_p = (
        torch.tensor([value]) for value in (params.top_k, params.top_p, params.min_p)
    )
    return torch.softmax(filter_logits(scaled, top_k, top_p, min_p), dim=-1)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_curve_is_what_the_sampler_draws_from(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(500, generator=generator, dtype=torch.float64)
    logits[7] = logits[3] = logits.max() - 0.5  # a tie
    curve = NextTokenCurve(torch.log_softmax(logits, dim=-1).numpy(), str)
    params = SamplingParams(**case)
    drawn = curve.probabilities(params)
    np.testing.assert_allclose(drawn, by_torch(logits, params).numpy(), atol=1e-12)
    summary = curve.summary(params)
    assert summary.num_survivors == np.count_nonzero(drawn)
    entropy = torch.special.entr(torch.from_numpy(drawn)).sum().item() / np.log(2)
    assert summary.entropy == pytest.approx(entropy)
    assert [bar.model for bar in summary.bars] == sorted(
        (bar.model for bar in summary.bars), reverse=True
    )


def test_forbidden_and_biased_tokens_are_in_the_curve() -> None:
    curve = NextTokenCurve(np.log(np.array([0.5, 0.25, 0.125, 0.125])), str, [0])
    drawn = curve.probabilities(SamplingParams(min_tokens=1))
    np.testing.assert_allclose(drawn, [0, 0.5, 0.25, 0.25])
    drawn = curve.probabilities(SamplingParams(allowed_token_ids=[2, 3]))
    np.testing.assert_allclose(drawn, [0, 0, 0.5, 0.5])
    drawn = curve.probabilities(SamplingParams(logit_bias={1: float(np.log(2))}))
    np.testing.assert_allclose(drawn, [0.4, 0.4, 0.1, 0.1])
    summary = curve.summary(SamplingParams(repetition_penalty=1.2))
    assert summary.not_shown == ("repetition_penalty",)


def test_the_model_is_asked_once_and_the_curve_follows_the_sliders(llm: LLM) -> None:
    controls = SamplingControls(SamplingParams(temperature=1.0), llm, PROMPT)
    forward_passes = llm.get_metrics()["generation_tokens"]
    first = controls.curve
    from_view(controls, temperature=2.0)
    from_view(controls, top_k=2)
    assert llm.get_metrics()["generation_tokens"] == forward_passes
    assert controls.curve != first
    assert "2 of 3,072 tokens can be drawn" in controls.curve
    assert "2 of 3,072 tokens can be drawn" in controls.static_text()


def test_the_curve_of_a_model_is_that_of_its_logits(llm: LLM) -> None:
    one = NextTokenCurve.of(llm, PROMPT)
    with LLM(device="cpu", dtype="float32", max_logprobs=-1) as other:
        np.testing.assert_allclose(
            one.logprobs, NextTokenCurve.of(other, PROMPT).logprobs, atol=1e-4
        )
    assert np.exp(one.logprobs).sum() == pytest.approx(1.0, abs=1e-4)
    outputs = llm.generate(
        [PROMPT] * 300,
        [SamplingParams(temperature=3.0, max_tokens=1, top_k=3, seed=i) for i in range(300)],
        use_tqdm=False,
    )
    drawn = one.probabilities(SamplingParams(temperature=3.0, top_k=3))
    ids = [output.outputs[0].token_ids[0] for output in outputs]
    counts = np.bincount(ids, minlength=len(drawn))
    np.testing.assert_allclose(counts / 300, drawn, atol=0.12)


def test_a_prompt_from_the_view_is_asked_about_in_the_background(llm: LLM) -> None:
    controls = SamplingControls(llm=llm)
    assert controls.can_preview and controls.curve == ""
    is_drawn = threading.Event()
    controls.observe(lambda _: is_drawn.set(), names="curve")
    controls._handle_custom_msg({"type": "preview", "prompt": PROMPT}, [])
    assert is_drawn.wait(30)
    assert controls.curve.startswith("<svg") and controls.prompt == PROMPT
    controls._preview_for_view("x" * 100_000)
    assert "tokens" in controls.curve_error and controls.prompt == PROMPT
    with pytest.raises(InvalidRequestError, match="needs llm"):
        SamplingControls().preview(prompt="x")


def test_the_picture_is_escaped_and_says_what_it_shows() -> None:
    curve = NextTokenCurve(np.log(np.array([0.6, 0.4])), lambda i: ("<b>\n", " &")[i])
    summary = curve.summary(SamplingParams())
    svg = curve_svg(summary, "<script>")
    assert "<b>" not in svg and "<script>" not in svg and "style=" not in svg
    assert 'role="img"' in svg and "<title>The next token after &lt;script&gt;" in svg
    assert "&lt;b&gt;↵" in svg and "·&amp;" in svg
    assert "60.0%" in curve_text(summary)
