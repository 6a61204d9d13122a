"""Generate: a text for each row, from text or a conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from nbllm.dataframe.call_options import check_choice
from nbllm.dataframe.journal import ChosenToken, RowResult, TokenLogprob
from nbllm.dataframe.prompts import frame_prompts, is_conversation, is_missing
from nbllm.dataframe.row_job import Part, Verb
from nbllm.errors import InvalidRequestError, RequestFailedError
from nbllm.inputs import EncodedPrompt
from nbllm.llm import LLM
from nbllm.outputs import CompletionOutput, Logprob, RequestOutput
from nbllm.sampling_params import (
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)

Params = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams] | None
Example = tuple[Any, str]
"""The prompt of a few-shot example, and its answer."""

_DEFAULTS = SamplingParams()
_NOT_IDENTITY = ("output_kind", "skip_clone")
_NOT_THE_CALL = ("journal", "use_tqdm", "on_interrupt", "label")
_CLASS = "SamplingParams"
_NESTED: dict[str, Any] = {
    "structured_outputs": StructuredOutputsParams,
    "repetition_detection": RepetitionDetectionParams,
}
_INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")


class Generate(Verb):
    """Texts, sampled.

    Args:
        llm: does it.
        params_of: how a row is sampled, by position.
        chat: True sends texts as a user's message through the chat template; "auto" if there is
            one.
        system: a system message for every row (implies chat).
        examples: shown before each row.
        keeps_tokens: token ids are part of the result.
        keeps_logprobs: log-probabilities of the tokens are, too.

    Raises:
        InvalidRequestError: `chat` is none of these.
    """

    def __init__(
        self,
        llm: LLM,
        params_of: Callable[[int], SamplingParams],
        *,
        chat: bool | str = "auto",
        system: str | None = None,
        examples: Sequence[Example] = (),
        keeps_tokens: bool = False,
        keeps_logprobs: bool = False,
    ) -> None:
        check_choice("chat", chat, (True, False, "auto"))
        self.llm = llm
        self._params_of = params_of
        if chat == "auto":
            tokenizer = llm._tokenizer
            chat = tokenizer is not None and bool(llm.chat_template or tokenizer.chat_template)
        self._chat = bool(chat) or system is not None
        self._system = system
        self._examples = examples
        self._keeps_tokens = keeps_tokens
        self._keeps_logprobs = keeps_logprobs
        self._last: tuple[SamplingParams, dict[str, Any]] | None = None  # and its identity

    def render(self, prompt: Any) -> Any:
        messages = prompt if is_conversation(prompt) else None
        if messages is None and self._chat and isinstance(prompt, str):
            messages = [
                message
                for question, answer in self._examples
                for message in (
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                )
            ]
            messages.append({"role": "user", "content": prompt})
        if messages is None:
            if self._examples and isinstance(prompt, str):
                shown = "".join(f"{question}{answer}\n\n" for question, answer in self._examples)
                return shown + prompt
            return prompt
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        try:
            return self.llm.render_chat(messages)
        except InvalidRequestError as error:
            return EncodedPrompt(None, [], error)

    def parts(self, row: int, prompt: EncodedPrompt) -> list[Part]:
        return [(prompt, self._params_of(row))]

    def identity(self, row: int) -> dict[str, Any] | None:
        params = self._params_of(row)
        if params.temperature > 0 and params.seed is None:
            return None
        if self._last is None or self._last[0] is not params:
            wish = {"keeps_logprobs": True} if self._keeps_logprobs else {}
            self._last = params, params_identity(params) | wish
        return self._last[1]

    def open(self, rows: Iterator[tuple[Any, Any, int]]) -> Any:
        return self.llm._call(rows)

    def result(self, outputs: list[RequestOutput], row: int) -> RowResult | Exception:
        output = outputs[0]
        completions = output.outputs
        num_top = self._params_of(row).logprobs
        return RowResult(
            texts=[completion.text for completion in completions],
            token_ids=[list(c.token_ids) for c in completions] if self._keeps_tokens else [],
            finish_reasons=[str(completion.finish_reason) for completion in completions],
            num_tokens=[len(completion.token_ids) for completion in completions],
            num_prompt_tokens=len(output.prompt_token_ids or ()),
            num_cached_tokens=output.num_cached_tokens,
            numbers=[n for c in completions for n in _confidence(c)] if num_top is not None else [],
            logprobs=[_token_logprobs(c, num_top or 0) for c in completions]
            if self._keeps_logprobs
            else [],
        )


def cut_error(completion: CompletionOutput) -> RequestFailedError:
    """Why a JSON document that did not come to its end is no result."""
    return RequestFailedError(
        f"the JSON was cut by {completion.finish_reason} after "
        f"{len(completion.token_ids)} tokens: raise max_tokens or max_model_len",
        parameter="max_tokens",
    )


def params_identity(params: SamplingParams) -> dict[str, Any]:
    """What of sampling parameters decides a text, as JSON: the fields that are not the default's.

    Results do not depend on how the default changes from one version to the next, as far as it is
    written out.
    """
    return {
        item.name: _as_json(getattr(params, item.name))
        for item in dataclasses.fields(params)
        if item.name not in _NOT_IDENTITY
        and not item.name.startswith("_")
        and getattr(params, item.name) != getattr(_DEFAULTS, item.name)
    }


def row_params(params: Params, llm: LLM, num_rows: int) -> Callable[[int], SamplingParams]:
    """How each row is sampled.

    Args:
        params: one for all rows; one each; or fields by name, each a value for all rows or a
            pandas Series with one value a row (missing: the default).
        llm: what its model recommends is the base of fields, and used for None.
        num_rows: of the frame.

    Raises:
        InvalidRequestError: lengths differ, or a field does not exist or has a wrong value.
    """
    if params is None or isinstance(params, SamplingParams):
        same = llm.get_default_sampling_params() if params is None else params
        return lambda row: same
    if not isinstance(params, Mapping):
        each = list(params)
        _check_length("sampling_params", len(each), num_rows)
        return each.__getitem__
    base = llm.get_default_sampling_params()
    fixed = {name: v for name, v in params.items() if not isinstance(v, pd.Series)}
    varying = {name: v.tolist() for name, v in params.items() if isinstance(v, pd.Series)}
    for name, values in varying.items():
        _check_length(name, len(values), num_rows)
    try:
        base = base.clone(**fixed)
    except TypeError as error:
        raise InvalidRequestError(
            f"sampling_params: {error}", parameter="sampling_params"
        ) from None
    if not varying:
        return lambda row: base

    def params_of(row: int) -> SamplingParams:
        cells = {name: values[row] for name, values in varying.items()}
        return base.clone(**{n: _field(n, v) for n, v in cells.items() if not is_missing(v)})

    return params_of


def _field(name: str, value: Any) -> Any:
    """pandas makes floats of integers where one is missing."""
    if name in _INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check_length(name: str, length: int, num_rows: int) -> None:
    if length != num_rows:
        raise InvalidRequestError(
            f"{name} has {length} entries for {num_rows} rows", parameter=name
        )


def _confidence(completion: CompletionOutput) -> tuple[float, float]:
    """Sum of the tokens' log-probabilities, and the smallest lead of a chosen token's probability
    over the next best one (negative where another was likelier)."""
    margin = float("nan")
    for entry, token_id in zip(completion.logprobs or [], completion.token_ids, strict=False):
        others = [item.logprob for other, item in entry.items() if other != token_id]
        if others:
            lead = entry[token_id].logprob - max(others)
            margin = lead if margin != margin else min(margin, lead)
    return float(completion.cumulative_logprob or 0.0), margin


def _token_logprobs(completion: CompletionOutput, num_top: int) -> list[ChosenToken]:
    tokens: list[ChosenToken] = []
    for entry, token_id in zip(completion.logprobs or [], completion.token_ids, strict=False):
        likeliest = sorted(entry.items(), key=lambda item: -item[1].logprob)
        top = [_token_logprob(*item) for item in likeliest[: num_top if num_top >= 0 else None]]
        tokens.append({**_token_logprob(token_id, entry[token_id]), "top": top})
    return tokens


def _token_logprob(token_id: int, entry: Logprob) -> TokenLogprob:
    return {"token": entry.decoded_token, "token_id": token_id, "logprob": entry.logprob}


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def with_logprobs(
    params_of: Callable[[int], SamplingParams], least: int
) -> Callable[[int], SamplingParams]:
    """The same, with at least so many log-probabilities; below zero: as they are."""
    if least < 0:
        return params_of
    last: list[SamplingParams] = []  # what was asked for, and what was made of it

    def reporting(row: int) -> SamplingParams:
        params = params_of(row)
        if params.logprobs is not None and params.logprobs >= least:
            return params
        if not last or last[0] is not params:
            last[:] = params, params.clone(logprobs=least)
        return last[1]

    return reporting


def example_pairs(
    examples: pd.DataFrame | None, source: Any, out: Hashable, **read: str
) -> list[Example]:
    """Prompts and answers of a frame with the template's columns and `out`.

    Raises:
        InvalidRequestError: columns or values are missing.
    """
    if examples is None:
        return []
    if out not in examples.columns:
        raise InvalidRequestError(
            f"examples have no column {out!r} with the answers", parameter="examples"
        )
    pairs = list(zip(frame_prompts(examples, source, **read), examples[out], strict=True))
    for prompt, answer in pairs:
        if prompt is None or is_missing(answer):
            raise InvalidRequestError("examples have missing values", parameter="examples")
        if isinstance(prompt, InvalidRequestError):
            raise prompt
    return [(prompt, str(answer)) for prompt, answer in pairs]


def arguments_as_json(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call as JSON, to make it again; None if some are not data."""
    content = {name: v for name, v in arguments.items() if name not in _NOT_THE_CALL}
    params = content.get("sampling_params")
    if isinstance(params, SamplingParams):
        content["sampling_params"] = {_CLASS: params_identity(params)}
    try:
        read: dict[str, Any] = json.loads(json.dumps(content))
    except (TypeError, ValueError):
        return None
    return read if read == content else None


def arguments_from_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `arguments_as_json` has written, as arguments."""
    content = dict(arguments)
    params = content.get("sampling_params")
    if isinstance(params, dict) and _CLASS in params:
        fields = dict(params[_CLASS])
        for name, kind in _NESTED.items():
            if name in fields:
                fields[name] = kind(**fields[name])
        content["sampling_params"] = SamplingParams(**fields)
    return content
