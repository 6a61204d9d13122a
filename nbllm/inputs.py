"""Prompts as users write them -> what the engine needs, one `Request` per continuation."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Union

import numpy as np

from nbllm.config import EngineConfig, ModelConfig
from nbllm.engine.request import Request, StopChecker, TokenConstraint
from nbllm.errors import InvalidRequestError, PromptTooLongError
from nbllm.sampling_params import SamplingParams, StructuredOutputsParams

_GOLDEN_64 = 0x9E3779B97F4A7C15  # the step of SplitMix64 (Steele et al., OOPSLA 2014)


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


Prompt = Union[str, list[int], TextPrompt, TokensPrompt]
"""Everything that is one prompt; a list of them is many."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One row of a call: text and token ids, or the error that it fails with."""

    text: str | None
    token_ids: list[int]
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A prompt that a chat template has made: its special tokens are in the text."""

    text: str


def is_single_prompt(prompts: Any) -> bool:
    """True for one prompt, False for a collection of prompts."""
    if isinstance(prompts, (str, Mapping, RenderedChat)):
        return True
    if isinstance(prompts, Sequence) and len(prompts) > 0:
        return all(_is_token_id(item) for item in prompts)
    return False


EncodeBatch = Callable[[list[str], bool], list[list[int]]]
"""Texts, and whether special tokens are added -> the token ids of each."""


def encode_prompts(prompts: Sequence[Any], encode_batch: EncodeBatch | None) -> list[EncodedPrompt]:
    """Tokenize many prompts at once; what is wrong with one of them becomes its own `error`.

    Args:
        prompts: in any of the forms of `Prompt`, rendered chats, or encoded already.
        encode_batch: the tokenizer's, or None with `skip_tokenizer_init`.
    """
    rows: list[EncodedPrompt | RenderedChat | str] = []
    for prompt in prompts:
        try:
            rows.append(_parse(prompt))
        except InvalidRequestError as error:
            rows.append(EncodedPrompt(prompt if isinstance(prompt, str) else None, [], error))
    texts = [row for row in rows if isinstance(row, str)]
    chats = [row.text for row in rows if isinstance(row, RenderedChat)]
    if (texts or chats) and encode_batch is None:
        missing = InvalidRequestError(
            "a text prompt needs a tokenizer, and skip_tokenizer_init=True: pass token ids",
            parameter="prompts",
        )
        return [
            r
            if isinstance(r, EncodedPrompt)
            else EncodedPrompt(r if isinstance(r, str) else r.text, [], missing)
            for r in rows
        ]
    encoded_texts = _encode_each(texts, True, encode_batch)
    encoded_chats = _encode_each(chats, False, encode_batch)
    return [
        row
        if isinstance(row, EncodedPrompt)
        else next(encoded_texts if isinstance(row, str) else encoded_chats)
        for row in rows
    ]


def _encode_each(
    texts: list[str], add_special_tokens: bool, encode_batch: EncodeBatch | None
) -> Iterator[EncodedPrompt]:
    if not texts or encode_batch is None:
        return
    try:
        ids = encode_batch(texts, add_special_tokens)
    except Exception:  # one text that can't be encoded must not take the others along
        if len(texts) > 1:
            for text in texts:
                yield from _encode_each([text], add_special_tokens, encode_batch)
            return
        error = InvalidRequestError("the tokenizer can't encode this text", parameter="prompts")
        yield EncodedPrompt(texts[0], [], error)
        return
    for text, token_ids in zip(texts, ids, strict=True):
        yield EncodedPrompt(text, token_ids)


def _parse(prompt: Any) -> EncodedPrompt | RenderedChat | str:
    """Text to be tokenized, or the row as it is."""
    if isinstance(prompt, (EncodedPrompt, RenderedChat)):
        return prompt
    if isinstance(prompt, Mapping):
        if isinstance(prompt.get("prompt_token_ids"), Sequence):
            text = prompt.get("prompt")
            ids = _token_ids(prompt["prompt_token_ids"])
            return EncodedPrompt(text if isinstance(text, str) else None, ids)
        prompt = prompt.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        return EncodedPrompt(None, _token_ids(prompt))
    raise InvalidRequestError(
        "a prompt must be a str, a list of token ids, {'prompt': str} or "
        f"{{'prompt_token_ids': list}}, got {type(prompt).__name__}",
        parameter="prompts",
    )


def _token_ids(ids: Sequence[Any]) -> list[int]:
    if set(map(type, ids)) <= {int}:  # nearly always: a prompt may have many thousands
        return list(ids)
    for item in ids:
        if not _is_token_id(item):
            raise InvalidRequestError(
                f"token ids must be integers, got {item!r}", parameter="prompt_token_ids"
            )
    return [int(item) for item in ids]


def _is_token_id(item: Any) -> bool:
    if isinstance(item, bool):
        return False
    return isinstance(item, int) or (hasattr(item, "__index__") and not hasattr(item, "__len__"))


class RequestFactory:
    """Validates a row against the model's limits and makes its requests.

    Args:
        config: the resolved configuration.
        model_config: vocabulary and end-of-sequence ids.
        tokenize: text -> ids without special tokens, for `bad_words`; None without a tokenizer.
        make_stop_checker: (prompt ids, params) -> a fresh `Request.stop_checker`.
        make_constraint: structured outputs -> a fresh `Request.constraint`; None without a
            tokenizer.
        draw_seed: a 64-bit seed for a request that brings none.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        tokenize: Callable[[str], list[int]] | None,
        make_stop_checker: Callable[[list[int], SamplingParams], StopChecker] | None,
        make_constraint: Callable[[StructuredOutputsParams], TokenConstraint] | None,
        draw_seed: Callable[[], int],
    ) -> None:
        assert config.max_model_len is not None
        self._config = config
        self._max_model_len = config.max_model_len
        self._model_config = model_config
        self._vocab_size = model_config.vocab_size
        self._rope_depends_on_length = model_config.length_rope is not None
        self._eos_token_ids = frozenset(model_config.eos_token_ids)
        self._tokenize = tokenize
        self._make_stop_checker = make_stop_checker
        self._make_constraint = make_constraint
        self._draw_seed = draw_seed
        self._num_made = 0

    def make(
        self,
        row: EncodedPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        streaming: bool = False,
    ) -> list[Request]:
        """One request per continuation of `row`.

        Raises:
            InvalidRequestError: prompt or parameters don't fit this model; says which and why.
        """
        if row.error is not None:
            raise row.error
        token_ids = self._check_prompt(row.token_ids)
        self._check_params(params)
        num_prompt_tokens = len(row.token_ids)
        room = self._max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        bad_words = self._bad_words(params)
        seed = params.seed if params.seed is not None else self._draw_seed()
        number = self._num_made
        self._num_made += 1
        # With caching off, the continuations of one prompt share its pages under their own salt.
        caching = self._config.enable_prefix_caching
        cache_salt = number + 1 if params.n > 1 and not caching else 0
        restart_len, restart_cache_salt = None, 0
        if self._rope_depends_on_length:
            model = self._model_config
            restart_len = model.rope_restart_len(num_prompt_tokens)
            if caching:
                cache_salt = model.rope_cache_salt(num_prompt_tokens)
                restart_cache_salt = model.rope_cache_salt(restart_len or 0)
        requests: list[Request] = []
        for index in range(params.n):
            request = Request(
                request_id=f"{number}-{index}" if params.n > 1 else str(number),
                token_ids=token_ids[:],
                num_prompt_tokens=num_prompt_tokens,
                sampling_params=params,
                max_tokens=max_tokens,
                seed=seed + index * _GOLDEN_64,
                eos_token_ids=eos,
                priority=priority,
                leader=requests[0] if requests else None,
                cache_salt=cache_salt,
                restart_len=restart_len,
                restart_cache_salt=restart_cache_salt,
                bad_words_token_ids=bad_words,
                constraint=self._constraint(params),
                stop_checker=self._stop_checker(row.token_ids, params),
                streaming=streaming,
            )
            requests.append(request)
        return requests

    def prepare(self, params: SamplingParams) -> None:
        """Compile the constraint of `params`, which takes up to a second, ahead of `make`."""
        if self._make_constraint is not None:
            self._constraint(params)

    def _stop_checker(self, token_ids: list[int], params: SamplingParams) -> StopChecker | None:
        if not params.stop:
            return None
        assert self._make_stop_checker is not None
        return self._make_stop_checker(token_ids, params)

    def _constraint(self, params: SamplingParams) -> TokenConstraint | None:
        if params.structured_outputs is None:
            return None
        assert self._make_constraint is not None
        return self._make_constraint(params.structured_outputs)

    def _check_prompt(self, token_ids: list[int]) -> array[int]:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty", parameter="prompts")
        if len(token_ids) >= self._max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, and max_model_len is "
                f"{self._max_model_len} for prompt and output together: shorten it"
                " or raise max_model_len",
                parameter="prompts",
            )
        return self._check_ids(token_ids, "prompt_token_ids")

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}",
                parameter="sampling_params",
            )
        params.verify()
        if params.thinking_token_budget is not None:
            raise InvalidRequestError(
                "thinking_token_budget is not supported yet", parameter="thinking_token_budget"
            )
        limit = self._config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            count = self._vocab_size if value == -1 else value
            if count is not None and limit != -1 and count > limit:
                raise InvalidRequestError(
                    f"{name}={value} is more than this LLM reports: it has max_logprobs={limit}",
                    parameter=name,
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            if getattr(params, name):
                self._check_ids(getattr(params, name), name)
        for name in ("stop", "bad_words", "structured_outputs"):
            if getattr(params, name) and self._tokenize is None:
                raise InvalidRequestError(
                    f"{name} needs a tokenizer, and skip_tokenizer_init=True", parameter=name
                )

    def _check_ids(self, ids: Collection[int], parameter: str) -> array[int]:
        """Token ids as C numbers.

        A wrong one would be an out-of-bounds read on the GPU, which kills the whole kernel.
        """
        try:
            packed = array("I", ids)
            if not packed or np.frombuffer(packed, dtype=np.uintc).max() < self._vocab_size:
                return packed
        except OverflowError:  # it is negative
            pass
        wrong = next(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
        raise InvalidRequestError(
            f"{parameter}: token id {wrong} is not in the vocabulary of {self._vocab_size}",
            parameter=parameter,
        )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each word as it is tokenized at the start of a text and after a space."""
        words: list[list[int]] = []
        for word in params.bad_words or ():
            assert self._tokenize is not None
            bare = word.lstrip()
            for text in (bare, " " + bare):
                ids = self._tokenize(text)
                if ids and ids not in words:
                    words.append(ids)
        return words
