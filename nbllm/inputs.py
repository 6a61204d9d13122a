"""Prompts as users write them -> token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Union

from nbllm.errors import InvalidRequestError


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
    """One row of a call: text and token ids, or the error that it fails with.

    Attributes:
        begun: token ids that an earlier call has generated, of each continuation: it goes on after
            them, and they are part of its output.
    """

    text: str | None
    token_ids: list[int]
    error: Exception | None = None
    begun: Sequence[Sequence[int]] = ()


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


def as_rows(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether there is one only that was not in a list."""
    is_single = is_single_prompt(prompts)
    return ([prompts] if is_single else list(prompts)), is_single


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
