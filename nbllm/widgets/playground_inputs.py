"""PlaygroundInputs: what a playground shows to be run, and the jobs that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM, Message
from nbllm.sampling_params import RequestOutputKind, SamplingParams
from nbllm.widgets.branch_tree import Token
from nbllm.widgets.lane import Job, Lane

_SLIDERS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")


@dataclass(frozen=True, slots=True)
class PlaygroundInputs:
    """A snapshot, for any thread.

    Attributes:
        llm: of lanes without one of their own; None is the default one.
        prompt: text, or the messages of a chat.
        params: of lanes without their own.
        seed: of lanes whose parameters have none. They share it: what they differ in is to come
            from their parameters, not from luck.
        top_logprobs: alternatives of a token, at most.
    """

    llm: LLM | None
    prompt: str | Sequence[Message]
    params: SamplingParams
    seed: int
    top_logprobs: int

    @property
    def title(self) -> str:
        """The prompt as text."""
        return shown_prompt(self.prompt)

    def jobs(self, lanes: Sequence[Lane], *, is_live: bool = False) -> dict[int, Job]:
        """What all lanes are to do; live ones go on from where the branch shown did.

        Raises:
            InvalidRequestError: the parameters or the messages are wrong.
        """
        jobs = {}
        for index, lane in enumerate(lanes):
            if is_live and lane.kept and lane.tree.prompt == self.title:
                jobs[index] = self.continued(lane, lane.kept, is_live=True)
            else:
                llm, params = self._setting(lane)
                jobs[index] = Job(llm, self._prompt_for(llm), self.title, params, is_live=is_live)
        return jobs

    def continued(self, lane: Lane, kept: list[Token], *, is_live: bool = False) -> Job:
        """A job that goes on in one lane after some tokens; raises as `Lane.continued`."""
        return lane.continued(kept, self._setting(lane)[1], is_live)

    def _setting(self, lane: Lane) -> tuple[LLM, SamplingParams]:
        llm = lane.llm or self.llm or default_llm()
        params = lane.params(self.params)
        limit = llm.config.max_logprobs
        count = self.top_logprobs if limit == -1 else min(self.top_logprobs, limit)
        return llm, params.clone(
            n=1,
            logprobs=count,
            logprob_token_ids=None,
            prompt_logprobs=None,
            detokenize=True,
            output_kind=RequestOutputKind.DELTA,
            seed=self.seed if params.seed is None else params.seed,
        )

    def _prompt_for(self, llm: LLM) -> Any:
        if isinstance(self.prompt, str):
            return self.prompt
        is_open = bool(self.prompt) and self.prompt[-1].get("role") == "assistant"
        return llm.render_chat(
            self.prompt, add_generation_prompt=not is_open, continue_final_message=is_open
        )


def shown_prompt(prompt: str | Sequence[Message]) -> str:
    """A prompt or a conversation as text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def slider_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the sliders show of some fields of `SamplingParams`: 0 for as many tokens as fit."""
    seed = fields["seed"]
    return {
        **{name: fields[name] for name in _SLIDERS},
        "max_tokens": fields["max_tokens"] or 0,
        "seed": None if seed is None else int(seed),
    }


def slider_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the sliders show; InvalidRequestError if there is no such slider."""
    unknown = set(values) - set(_SLIDERS)
    if unknown:
        raise InvalidRequestError(f"there is no slider {unknown.pop()!r}", parameter="values")
    return {**values, "max_tokens": values.get("max_tokens") or None}


def check_arguments(llm: Any, prompt: Any, chat: Any) -> None:
    """Raise InvalidRequestError if one of a playground's arguments is of a wrong type."""
    if llm is not None and not isinstance(llm, LLM):
        raise InvalidRequestError(f"llm must be an LLM, not {type(llm).__name__}", parameter="llm")
    if not isinstance(prompt, str):
        raise InvalidRequestError("prompt must be a text", parameter="prompt")
    is_list = isinstance(chat, Sequence) and all(isinstance(message, Mapping) for message in chat)
    if not isinstance(chat, bool) and not is_list:
        raise InvalidRequestError("chat must be True or a list of messages", parameter="chat")
