"""SamplingControls: sliders whose values go into any call.

controls = nbllm.SamplingControls()
controls                                    # shows it
llm.generate(prompts, controls.params)      # the cell, the DataFrame, the stream
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets

from nbllm.errors import InvalidRequestError
from nbllm.sampling_params import SamplingParams

_FILTERS = ("top_p", "top_k", "min_p", "seed")


class SamplingControls(ipywidgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """The parameters that people turn, as widgets; the others keep the values they came with.

    With temperature 0 the filters and the seed have no effect and are greyed out. It works without
    a frontend, too: set `.temperature.value` and read `.params`.

    Args:
        params: where the controls start; default `SamplingParams()` with 256 tokens.

    Attributes:
        params: a new `SamplingParams` with what the controls show; assign one to set them.
        temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed, stop: the widgets.
            An empty seed draws one, `max_tokens` 0 is as many as fit, `stop` has a string a line.
    """

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.temperature = _slider("temperature", 0.0, 2.0, 0.05)
        self.top_p = _slider("top_p", 0.01, 1.0, 0.01)
        self.top_k = ipywidgets.BoundedIntText(description="top_k", min=0, max=1_000_000)
        self.min_p = _slider("min_p", 0.0, 1.0, 0.01)
        self.repetition_penalty = _slider("repetition", 0.5, 2.0, 0.01)
        self.max_tokens = ipywidgets.BoundedIntText(description="max_tokens", min=0, max=10**9)
        self.seed = ipywidgets.Text(description="seed", placeholder="drawn anew")
        self.stop = ipywidgets.Textarea(description="stop", placeholder="one string a line", rows=2)
        self._message = ipywidgets.HTML()
        self._base = SamplingParams(max_tokens=256) if params is None else params
        super().__init__([*self._controls().values(), self._message])
        self.params = self._base
        for control in self._controls().values():
            control.observe(self._on_change, names="value")
        self._on_change()

    @property
    def params(self) -> SamplingParams:
        """What the controls show.

        Raises:
            InvalidRequestError: they show what can't be sampled, a seed that is no number say.
        """
        seed = self.seed.value.strip()
        try:
            number = int(seed) if seed else None
        except ValueError as error:
            raise InvalidRequestError(f"seed must be an integer: {seed!r}", parameter="seed") from (
                error
            )
        return replace(
            self._base,
            temperature=self.temperature.value,
            top_p=self.top_p.value,
            top_k=self.top_k.value,
            min_p=self.min_p.value,
            repetition_penalty=self.repetition_penalty.value,
            max_tokens=self.max_tokens.value or None,
            seed=number,
            stop=[line for line in self.stop.value.splitlines() if line] or None,
        )

    @params.setter
    def params(self, params: SamplingParams) -> None:
        self._base = params
        stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        for name, value in {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": max(params.top_k, 0),
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "max_tokens": params.max_tokens or 0,
            "seed": "" if params.seed is None else str(params.seed),
            "stop": "\n".join(stop),
        }.items():
            self._controls()[name].value = value

    def _controls(self) -> dict[str, Any]:
        names = ("temperature", *_FILTERS[:3], "repetition_penalty", "max_tokens", "seed", "stop")
        return {name: getattr(self, name) for name in names}

    def _on_change(self, _: Any = None) -> None:
        for name in _FILTERS:
            getattr(self, name).disabled = self.temperature.value == 0
        try:
            self.params  # noqa: B018  # for its error
            self._message.value = ""
        except InvalidRequestError as error:
            self._message.value = f"<b>{type(self).__name__}</b>: {_escape(str(error))}"


def _slider(name: str, low: float, high: float, step: float) -> Any:
    return ipywidgets.FloatSlider(
        description=name, min=low, max=high, step=step, value=low, readout_format=".2f"
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
