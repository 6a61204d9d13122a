"""Playground: prompt, sliders, the text as it comes, and what else could have come.

nbllm.Playground(llm, "Once upon a time")       # in a cell
nbllm.Playground(llm, compare=[{"temperature": 0}, {"temperature": 1.2}])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import traitlets

from nbllm.checks import check_int
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM, Message
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import SamplingParams
from nbllm.widgets.background_loop import call_in_background, in_background, is_background
from nbllm.widgets.branch_tree import BranchTree
from nbllm.widgets.compared import Compared, make_lanes
from nbllm.widgets.frozen import Frozen
from nbllm.widgets.lane import Lane
from nbllm.widgets.lane_picture import lanes_svg, lanes_text
from nbllm.widgets.lane_runner import LaneRunner
from nbllm.widgets.playground_commands import PlaygroundCommands
from nbllm.widgets.playground_inputs import (
    PlaygroundInputs,
    check_arguments,
    shown_prompt,
    slider_fields,
    slider_values,
)
from nbllm.widgets.sampling_controls import SamplingControls
from nbllm.widgets.token_map import COLORS
from nbllm.widgets.view_source import view_source, view_style


class Playground(Frozen):
    """A prompt and what a model makes of it, token by token.

    Each token has the colour of its probability and shows what else could have stood there; a
    click on one of those goes on from it, and the branches stay in a tree. With `live`, a moved
    slider generates anew at once. All of it works from code, too, also without a frontend.

    Args:
        llm: default: what accessors use, see `nbllm.set_default_llm`.
        prompt: where it starts.
        chat: True makes the prompt the first message of a conversation; or the messages.
        controls: a `SamplingControls`, shown elsewhere, that the sliders here follow, and it them.
        compare: several texts side by side, of one batch: each a `SamplingParams`, a dict of some
            fields (the sliders have the others), an `LLM`, or a pair `(LLM, either)`; a list of
            them, or a dict with their titles.
        params: where the sliders start and what else is sampled with; default: what the model
            recommends, with 256 tokens.
        top_logprobs: how many alternatives a token shows, 0 to the LLM's `max_logprobs`.
        live: generate anew when a slider moves or the prompt changes.

    Attributes:
        prompt, messages, live: as above; may be set.
        values: what the sliders show, by name of the field.
        error: what is wrong with what was asked for, or "".
        lanes: what is side by side, one without `compare`.

    Raises:
        InvalidRequestError: an argument is wrong.
    """

    _esm = view_source("token_view", "lane_view", "playground")
    _css = view_style("token_view", "playground")

    prompt = traitlets.Unicode().tag(sync=True)
    messages = traitlets.List().tag(sync=True)
    is_chat = traitlets.Bool().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    live = traitlets.Bool().tag(sync=True)
    is_numeric = traitlets.Bool().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)
    colors = traitlets.List(COLORS).tag(sync=True)
    model_name = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        llm: LLM | None = None,
        prompt: str = "",
        *,
        chat: bool | Sequence[Message] = False,
        controls: SamplingControls | None = None,
        compare: Iterable[Compared] | Mapping[str, Compared] | None = None,
        params: SamplingParams | None = None,
        top_logprobs: int = 5,
        live: bool = False,
    ) -> None:
        check_arguments(llm, prompt, chat)
        self._llm = llm
        self._top_logprobs = check_int("top_logprobs", top_logprobs, minimum=0)
        self._controls = controls
        first_llm = llm or default_llm()
        if controls is not None:
            params = controls.params
        elif params is None:
            params = first_llm.get_default_sampling_params()
            params = params if params.max_tokens is not None else params.clone(max_tokens=256)
        self._base = params
        self._is_quiet = False
        self._runner = LaneRunner(make_lanes(compare), self.send, partial(self.set_trait, "state"))
        self._commands = PlaygroundCommands(self._runner, self._inputs)
        messages: list[Message] = [] if isinstance(chat, bool) else list(chat)
        if chat and (prompt or not messages):
            messages.append({"role": "user", "content": prompt})
        super().__init__(
            prompt=prompt,
            messages=[dict(message) for message in messages],
            is_chat=bool(chat),
            values=slider_values(asdict(params)),
            live=live,
            model_name=first_llm.model_name,
        )
        self._commands.jobs()  # for what is wrong with them
        call_in_background(self._runner.publish)
        self.on_msg(self._on_message)
        self.observe(self._on_change, names=["values", "prompt", "messages", "live"])
        if controls is not None:
            controls.observe(self._follow_controls, names="params")

    # -- from code ----------------------------------------------------------------------------

    def run(self, prompt: str | None = None) -> Playground:
        """Generate; what still runs ends. Returns itself at once: `.run().wait().text`.

        Args:
            prompt: instead of the one shown; in a chat, instead of the last message.

        Raises:
            InvalidRequestError: the parameters or messages are wrong. What is wrong with the
                prompt is found while it runs: `wait` raises it, and the widget shows it.
            EngineClosedError, EngineDeadError: from `wait`, too.
        """
        if prompt is not None:
            with self._without_live():
                self._set_prompt(prompt)
        jobs = self._commands.jobs()
        self.error = ""
        in_background(self._runner.start, jobs)
        return self

    def stop(self) -> None:
        """End what runs; the text so far stays. The pages are free when this returns."""
        if is_background():
            self._runner.cancel()
        else:
            self._runner.stop()

    def wait(self, timeout_s: float | None = None) -> Playground:
        """Wait until all lanes are done, and return itself.

        Raises:
            TimeoutError: that took longer than so many seconds; it goes on.
            NbllmError: a lane has failed.
            RuntimeError: called by an observer of this widget, for which it would wait.
        """
        if is_background():
            raise RuntimeError("an observer of the playground can't wait for it")
        if not self._runner.wait(timeout_s):
            raise TimeoutError(f"it still generates after {timeout_s} s")
        for lane in self.lanes:
            if lane.error is not None:
                raise lane.error
        return self

    def branch(self, index: int, token_id: int | None = None, *, lane: int = 0) -> Playground:
        """Go on from another token; the text that was there stays in the tree.

        Args:
            index: place of the token in the text shown.
            token_id: one of the alternatives there; None is the token that is there.
            lane: index in `lanes`.

        Raises:
            InvalidRequestError: there is no such place or alternative.
        """
        call_in_background(lambda: self._commands.branch(lane, index, token_id))
        return self

    def edit(self, text: str, *, lane: int = 0) -> Playground:
        """Go on from a text instead of the generated one; what they share is not computed again.

        Raises:
            InvalidRequestError: nothing was generated yet.
        """
        call_in_background(lambda: self._commands.edit(lane, text))
        return self

    def select(self, node: int, *, lane: int = 0) -> Playground:
        """Show another continuation of the tree, up to a node; what runs in the lane ends.

        Raises:
            InvalidRequestError: there is no such node.
        """
        call_in_background(lambda: self._commands.select(lane, node))
        return self

    def freeze(self) -> None:
        """Stop, and replace the view by a picture of the text, see `Frozen.freeze`."""
        self.stop()
        super().freeze()

    def close(self) -> None:
        """End what runs, and the view."""
        if hasattr(self, "_runner"):  # else an argument was wrong
            in_background(self._runner.cancel)
        super().close()

    @property
    def lanes(self) -> list[Lane]:
        """What is side by side."""
        return self._runner.lanes

    @property
    def result(self) -> RequestOutput | None:
        """What the engine has said to the last request of the first lane so far.

        After a branch its prompt has the tokens before it. None before the first token.
        """
        return self.lanes[0].result

    @property
    def results(self) -> list[RequestOutput | None]:
        """`result` of each lane."""
        return [lane.result for lane in self.lanes]

    @property
    def text(self) -> str:
        """The text that the first lane shows."""
        return self.lanes[0].text

    @property
    def tree(self) -> BranchTree:
        """All continuations of the first lane's prompt: `pandas.DataFrame(p.tree.rows())`."""
        return self.lanes[0].tree

    @property
    def params(self) -> SamplingParams:
        """What the sliders show.

        Raises:
            InvalidRequestError: that can't be sampled with.
        """
        return replace(self._base, **slider_fields(self.values))

    # -- static forms -------------------------------------------------------------------------

    def static_text(self) -> str:
        """The prompt and the texts."""
        return lanes_text(shown_prompt(self._prompt()), self.lanes)

    def static_svg(self) -> str | None:
        """The texts with the probability of each token; None if there are none."""
        return lanes_svg(shown_prompt(self._prompt()), self.lanes)

    # -- in the background --------------------------------------------------------------------

    def _handle(self, content: Mapping[str, Any]) -> None:
        """Do what a view asks for."""
        try:
            if content.get("type") == "sync":
                self._runner.publish(anew=True)
                return
            self.error = ""
            if content.get("type") == "reply":
                self._reply()
                return
            with self._without_live():  # what it shows comes along: a trait may be under way still
                for name in ("prompt", "messages", "values"):
                    if name in content:
                        setattr(self, name, content[name])
            self._commands.do(content)
        except Exception as error:  # whatever it is, the user sees it
            self._fail(error)

    def _regenerate(self) -> None:
        try:
            self.error = ""
            self._commands.run_live()
        except Exception as error:  # whatever it is, the user sees it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        is_known = isinstance(error, InvalidRequestError)
        self.error = str(error) if is_known else f"{type(error).__name__}: {error}"

    def _reply(self) -> None:
        """Make the first lane's text the next message, and open one for the answer to it."""
        self._runner.cancel()
        answer = {"role": "assistant", "content": self.lanes[0].text}
        with self._without_live():
            self.messages = [*self.messages, answer, {"role": "user", "content": ""}]

    # -- in any thread ------------------------------------------------------------------------

    def _on_message(self, _: Any, content: Any, buffers: Any) -> None:
        in_background(self._handle, content)

    def _on_change(self, change: Any) -> None:
        if change["name"] == "values" and self._controls is not None:
            try:
                self._controls.values = slider_fields(self.values)
            except InvalidRequestError as error:
                self._fail(error)
        if self.live and not self._is_quiet:
            in_background(self._regenerate)

    def _follow_controls(self, change: Any) -> None:
        assert self._controls is not None
        self._base = change["new"]
        # Not those of the params, which have no filters while the temperature is 0.
        self.values = slider_values(self._controls.values)

    @contextmanager
    def _without_live(self) -> Iterator[None]:
        """What is changed here is about to be run."""
        self._is_quiet = True
        try:
            yield
        finally:
            self._is_quiet = False

    def _set_prompt(self, prompt: str) -> None:
        if not self.is_chat:
            self.prompt = prompt
            return
        messages = list(self.messages)
        if messages and messages[-1].get("role") == "user":
            messages.pop()
        self.messages = [*messages, {"role": "user", "content": prompt}]

    def _inputs(self, seed: int) -> PlaygroundInputs:
        """What is shown now.

        Raises:
            InvalidRequestError: it can't be sampled with.
        """
        return PlaygroundInputs(self._llm, self._prompt(), self.params, seed, self._top_logprobs)

    def _prompt(self) -> str | list[Message]:
        return list(self.messages) if self.is_chat else str(self.prompt)
