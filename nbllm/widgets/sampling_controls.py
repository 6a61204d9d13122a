"""SamplingControls: sliders whose values go into any call.

controls = nbllm.SamplingControls(llm=llm, prompt="The capital of France is")
controls                                    # shows it
llm.generate(prompts, controls.params)      # the cell, the DataFrame, the stream
"""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import traitlets

from nbllm.errors import InvalidRequestError, NbllmError
from nbllm.llm import LLM
from nbllm.sampling_params import SamplingParams
from nbllm.widgets.frozen import Frozen
from nbllm.widgets.next_token_curve import NextTokenCurve, curve_svg, curve_text
from nbllm.widgets.undo_history import UndoHistory
from nbllm.widgets.view_source import view_source, view_style

_SHAPE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_CONTROLS = (
    *_SHAPE,
    "max_tokens",
    "min_tokens",
    "seed",
    "stop",
    "n",
    "logprobs",
    "ignore_eos",
)
_PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"temperature": 0.0},
    "balanced": {"temperature": 0.7, "top_p": 0.95},
    "creative": {"temperature": 1.1, "min_p": 0.05},
}
_MODELS_OWN = "model's default"
_DEFAULT = SamplingParams()
_LARGEST_EXACT = 2**53  # integers beyond lose digits in a browser
_GREEDY = "no effect at temperature 0, which always takes the likeliest token"
_ONE_LEFT = "no effect with top_k 1, which leaves one token"
_CLASSES = (  # that the repr of a SamplingParams may name
    "RepetitionDetectionParams",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
)


class _ValidParams(traitlets.Instance):  # type: ignore[misc]  # traitlets has no types
    """A `SamplingParams` that can't be read while a control shows what can't be sampled with."""

    def get(self, obj: SamplingControls, cls: Any = None) -> SamplingParams:
        for name, message in obj.errors.items():
            raise InvalidRequestError(message, parameter=name)
        params: SamplingParams = super().get(obj, cls)
        return params.clone()


class SamplingControls(Frozen):
    """The parameters that people turn, as one widget; the others keep the values they came with.

    What has no effect is greyed out and says why, what is wrong says so beside its control. It
    works without a frontend, too: assign `.values` or `.params`, and observe them.

    Args:
        params: where the controls start; default: what the model recommends, with 256 tokens.
        llm: for its recommendation and the curve.
        prompt: shows what the parameters do to the odds of the token after it, see `preview`.

    Attributes:
        params: a new `SamplingParams` with what the controls show. Assign one to set them;
            `controls.observe(f, names="params")` calls `f` with each valid change. Reading raises
            InvalidRequestError while `errors` has an entry.
        values: what each control shows, by name of the field. Assigning some changes these only.
        errors: name -> what is wrong there.
        idle: name -> why it has no effect now.
        presets: name -> values.
    """

    _esm = view_source("sampling_controls", "sampling_controls_view")
    _css = view_style("sampling_controls")

    params = _ValidParams(SamplingParams)
    values = traitlets.Dict().tag(sync=True)
    errors = traitlets.Dict().tag(sync=True)
    idle = traitlets.Dict().tag(sync=True)
    presets = traitlets.Dict().tag(sync=True)
    code_text = traitlets.Unicode().tag(sync=True)
    curve = traitlets.Unicode().tag(sync=True)
    curve_error = traitlets.Unicode().tag(sync=True)
    prompt = traitlets.Unicode(allow_none=True, default_value=None).tag(sync=True)
    can_preview = traitlets.Bool(False).tag(sync=True)
    can_undo = traitlets.Bool(False).tag(sync=True)
    can_redo = traitlets.Bool(False).tag(sync=True)
    gesture = traitlets.Int().tag(sync=True)  # the view counts: changes of one are one step

    def __init__(
        self,
        params: SamplingParams | None = None,
        llm: LLM | None = None,
        prompt: str | None = None,
    ) -> None:
        if params is None:
            params = _DEFAULT if llm is None else llm.get_default_sampling_params()
            if params.max_tokens is None:
                params = params.clone(max_tokens=256)
        self._base = params
        self._llm = llm
        self._next_token: NextTokenCurve | None = None
        self._gesture: int | None = None  # of the message from the view that is being handled
        values = _values_of(params)
        self._history = UndoHistory(values)
        super().__init__(params=params, values=values)
        self.presets = self._make_presets()
        self.can_preview = llm is not None
        self.observe(self._on_values, names="values")
        self.observe(self._on_params, names="params")
        self.on_msg(self._on_message)
        self._show()
        if prompt is not None:
            self.preview(llm, prompt)

    def code(self) -> str:
        """Python that makes the same parameters and calls a DataFrame's column with them.

        Only what differs from the defaults is written out.

        Raises:
            InvalidRequestError: as reading `params`.
        """
        params = self.params
        kind = params.output_kind
        call = repr(params).replace(repr(kind), str(kind))
        names = ", ".join(name for name in _CLASSES if name in call)
        return (
            f"from nbllm import {names}\n\n"
            f"sampling_params = {call}\n"
            'df.llm.generate("prompt", sampling_params)'
        )

    def apply_preset(self, name: str) -> None:
        """Set the controls that shape the distribution as `presets[name]` says.

        Raises:
            InvalidRequestError: there is no such preset.
        """
        if name not in self.presets:
            known = ", ".join(self.presets)
            raise InvalidRequestError(f"no preset {name!r}; there are: {known}", parameter="name")
        self.values = self.presets[name]

    def undo(self) -> None:
        """Take back the last change; the first state stays."""
        self._go(-1)

    def redo(self) -> None:
        """Make the change again that was taken back last."""
        self._go(1)

    def preview(self, llm: LLM | None = None, prompt: str | None = None) -> None:
        """Show what the parameters do to the odds of the token after a prompt.

        The model is asked once; afterwards the curve follows the controls without it.

        Args:
            llm: who is asked; default: the one that the controls came with.
            prompt: default: the last one.

        Raises:
            InvalidRequestError: there is no `LLM` or no prompt, or the prompt is wrong.
            EngineClosedError, EngineDeadError: no more requests are taken.
        """
        llm = self._llm if llm is None else llm
        prompt = self.prompt if prompt is None else prompt
        if llm is None or prompt is None:
            missing = "llm" if llm is None else "prompt"
            raise InvalidRequestError(f"a preview needs {missing}", parameter=missing)
        curve = NextTokenCurve.of(llm, prompt)
        self._llm, self._next_token = llm, curve
        self.can_preview, self.prompt, self.curve_error = True, prompt, ""
        if _MODELS_OWN not in self.presets:
            self.presets = self._make_presets()
        self._show()

    def static_text(self) -> str:
        """The parameters, and the curve if there is one."""
        if self.errors:
            return "SamplingControls: " + "; ".join(self.errors.values())
        text = repr(self.params).replace("SamplingParams", "SamplingControls", 1)
        if self._next_token is None:
            return text
        return f"{text}\n\n{curve_text(self._next_token.summary(self.params))}"

    def static_html(self) -> str | None:
        """A table of the parameters, if there is no curve."""
        if self.curve:
            return None
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td>"
            f"<td>{html.escape(self.errors.get(name) or self.idle.get(name) or '')}</td></tr>"
            for name, value in self.values.items()
            if value != getattr(_DEFAULT, name) or name == "temperature" or name in self.errors
        )
        return f"<table><caption>SamplingControls</caption>{rows}</table>"

    def static_svg(self) -> str | None:
        """The curve, if there is one."""
        return self.curve or None

    @traitlets.validate("values")  # type: ignore[untyped-decorator]
    def _merge(self, proposal: Any) -> dict[str, Any]:
        new: Mapping[str, Any] = proposal["value"]
        for name in new:
            if name not in _CONTROLS:
                raise InvalidRequestError(f"there is no control for {name!r}", parameter=name)
        merged = {**self.values, **new}
        return {name: _plain(name, merged[name]) for name in _CONTROLS}

    def _on_values(self, _: Any) -> None:
        self._history.remember(self.values, self._gesture)
        params, errors = self._check()
        self.errors = errors
        if not errors:
            self.set_trait("params", params)
        self._show()

    def _on_params(self, change: Any) -> None:
        # With temperature 0 the params have no filters, but the controls keep theirs.
        if self._check() == (change["new"], {}):
            return
        self._base = change["new"]
        self.values = _values_of(self._base)

    def _check(self) -> tuple[SamplingParams, dict[str, str]]:
        """What the controls make, and what is wrong with them: then it has defaults there."""
        fields = dict(self.values)
        errors: dict[str, str] = {}
        if isinstance(fields["seed"], str) and _is_integer(fields["seed"]):
            fields["seed"] = int(fields["seed"])
        while True:
            try:
                return replace(self._base, **fields), errors
            except InvalidRequestError as error:
                name = error.parameter
                if name is None or name not in fields or name in errors:
                    raise
                errors[name] = str(error)
                fields[name] = getattr(_DEFAULT, name)

    def _show(self) -> None:
        """Bring what follows from the values up to date."""
        self.can_undo, self.can_redo = self._history.can_undo, self._history.can_redo
        self.idle = self._without_effect()
        self.code_text = "" if self.errors else self.code()
        if self._next_token is not None and not self.errors:
            self.curve = curve_svg(self._next_token.summary(self.params), self.prompt or "")

    def _without_effect(self) -> dict[str, str]:
        names: tuple[str, ...] = ()
        reason = _GREEDY
        if self.values["temperature"] == 0:
            names = ("top_p", "top_k", "min_p", "seed")
        elif self.values["top_k"] == 1:
            names, reason = ("top_p", "min_p", "seed"), _ONE_LEFT
        return {name: reason for name in names if name not in self.errors}  # wrong: to be mended

    def _make_presets(self) -> dict[str, dict[str, Any]]:
        plain = {name: getattr(_DEFAULT, name) for name in _SHAPE}
        presets = {name: {**plain, **values} for name, values in _PRESETS.items()}
        if self._llm is not None:
            own = _values_of(self._llm.get_default_sampling_params())
            presets[_MODELS_OWN] = {name: own[name] for name in _SHAPE}
        return presets

    def _go(self, step: int) -> None:
        self.values = self._history.move(step)

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """What the view has changed; ipywidgets calls it."""
        self._gesture = sync_data.get("gesture")
        try:
            super().set_state(sync_data)
        finally:
            self._gesture = None

    def _on_message(self, _: Any, content: dict[str, Any], __: Any) -> None:
        kind = content.get("type")
        if kind == "undo":
            self.undo()
        elif kind == "redo":
            self.redo()
        elif kind == "preset":
            self.apply_preset(content["name"])
        elif kind == "preview":
            # Not here: the kernel's other messages would wait for the model.
            thread = threading.Thread(
                target=self._preview_for_view, args=(content["prompt"],), daemon=True
            )
            thread.start()

    def _preview_for_view(self, prompt: str) -> None:
        try:
            self.preview(prompt=prompt)
        except NbllmError as error:
            self.curve_error = str(error)


def _values_of(params: SamplingParams) -> dict[str, Any]:
    return {name: _plain(name, getattr(params, name)) for name in _CONTROLS}


def _plain(name: str, value: Any) -> Any:
    """A control's value in the form in which it travels; what is wrong stays as it is."""
    if name == "stop":
        return [value] if isinstance(value, str) else list(value or ())
    if name == "seed":
        if isinstance(value, str):
            value = int(value) if _is_integer(value) else value.strip() or None
        is_large = isinstance(value, int) and abs(value) > _LARGEST_EXACT
        return str(value) if is_large else value
    if isinstance(getattr(_DEFAULT, name), float) and type(value) is int:
        return float(value)
    return value


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*-?[0-9]{1,40}\s*", text) is not None
