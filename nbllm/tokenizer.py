"""Tokenizer: text to token ids and back, without importing transformers where that can be avoided.

A folder with a `tokenizer.json` is read by the `tokenizers` library alone, which takes a fraction
of a second; `transformers` is imported only for folders that have older files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from nbllm.chat_template import render_chat_template
from nbllm.detokenizer import IncrementalDetokenizer
from nbllm.errors import InvalidRequestError, ModelLoadError
from nbllm.model_files import find_file, has_file, read_json
from nbllm.prefix_encoder import PrefixEncoder

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        fast: the `tokenizers` object that does the work.
        special_tokens: name -> text, such as {"eos_token": "</s>"}.
        chat_template: Jinja text, or a dict of named ones, or None.

    Attributes:
        special_tokens: as given.
        eos_token_id, bos_token_id: or None.
        is_byte_level: tokens stand for bytes, which their text is the UTF-8 of.
        all_special_ids: ids that `skip_special_tokens` leaves out.
        chat_template: the default template, or None.
        chat_templates: all of them, by name.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        self.backend = fast
        self._prefix_encoder = PrefixEncoder(fast)
        self.special_tokens = dict(special_tokens or {})
        if isinstance(chat_template, str):
            chat_template = {"default": chat_template}
        self.chat_templates = dict(chat_template or {})
        self.chat_template = self.chat_templates.get("default")
        self.eos_token_id = self._special_id("eos_token")
        self.bos_token_id = self._special_id("bos_token")
        self.is_byte_level = type(fast.decoder).__name__ == "ByteLevel"
        added = fast.get_added_tokens_decoder()
        self.all_special_ids = frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def max_token_chars(self) -> int | None:
        """Characters of a text that one token may stand for, at most; None if nobody knows."""
        if not self.is_byte_level:
            return None
        # A byte each, and no character has less; twice that for what a normalizer composes.
        return 2 * max(map(len, self.backend.get_vocab()))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load from a model folder.

        Raises:
            ModelLoadError: no tokenizer there, or a damaged one.
        """
        config = _read_optional(folder, "tokenizer_config.json")
        if has_file(folder, "tokenizer.json"):
            path = find_file(folder, "tokenizer.json")
            try:
                fast = FastTokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exceptions
                raise ModelLoadError(f"tokenizer.json in {folder}: {error}") from error
        else:
            fast = _convert(folder)
        fast.no_truncation()
        fast.no_padding()
        special = _read_optional(folder, "special_tokens_map.json") | config
        texts = {name: _token_text(name, special[name]) for name in _NAMES if special.get(name)}
        _complete(fast, config, texts)
        return cls(fast, special_tokens=texts, chat_template=_read_template(folder, config))

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequestError: it is no text that UTF-8 can hold (half of a surrogate pair).
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError(
                f"the tokenizer can't encode this text: {error}", parameter="prompts"
            ) from error
        return ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of many texts, on all cores; what they begin with in common is done once."""
        return self._prefix_encoder.encode_batch(texts, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, special or not."""
        return self.decode([token_id], skip_special_tokens=False)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's entries; None for an id that it does not have."""
        return [self.backend.id_to_token(token_id) for token_id in ids]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation to the text that the model was trained on.

        Args:
            messages: dicts with "role" and "content".
            chat_template: Jinja text, or the name of one of `chat_templates`.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open.
            tools: JSON-schema descriptions of functions.
            chat_template_kwargs: further variables of the template, from a user.
            **variables: the same.

        Raises:
            InvalidRequestError: there is no template, or it fails on this conversation.
        """
        templates = self.chat_templates
        template: str | None
        if chat_template is not None:
            template = templates.get(chat_template, chat_template)
        else:
            template = (templates.get("tool_use") if tools else None) or self.chat_template
        if not template:
            raise InvalidRequestError(
                "this model has no chat template: pass chat_template=, or use generate()",
                parameter="chat_template",
            )
        if variables.pop("tokenize", False):
            raise InvalidRequestError("tokenize must be False: encode() the text", parameter=None)
        return render_chat_template(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=self.special_tokens | variables | dict(chat_template_kwargs or {}),
        )

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id: int | None = self.backend.token_to_id(text) if text is not None else None
        return token_id


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if has_file(folder, name) else {}


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    if has_file(folder, "chat_template.jinja"):
        try:
            return find_file(folder, "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"chat_template.jinja in {folder}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, with names
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in template}
        except (KeyError, TypeError) as error:
            raise ModelLoadError(f"tokenizer_config.json: chat_template: {error!r}") from error
    return template if isinstance(template, str) else None


def _complete(fast: FastTokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add what tokenizer_config.json knows of added tokens and tokenizer.json does not.

    Tokens with a role (end of sequence, ...) are special even if tokenizer.json does not say so.
    """
    entries = config.get("added_tokens_decoder")
    if isinstance(entries, Mapping):
        known = fast.get_added_tokens_decoder()
        ids = sorted(int(i) for i in entries if str(i).isdigit() and int(i) not in known)
        for token_id in ids:
            entry = entries[str(token_id)]
            text = _token_text("added_tokens_decoder", entry)
            if fast.token_to_id(text) is None and fast.get_vocab_size() == token_id:
                flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
                given = entry if isinstance(entry, Mapping) else {}
                options = {flag: bool(given[flag]) for flag in flags if flag in given}
                fast.add_tokens([AddedToken(text, **options)])
    special = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    missing = [t for t in named.values() if t not in special and fast.token_to_id(t) is not None]
    if missing:
        fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])


def _token_text(name: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise ModelLoadError(f"tokenizer_config.json: {name} is {token!r}, not a text")
    return text


def _convert(folder: Path) -> FastTokenizer:
    """Build the fast tokenizer of a folder that has vocab.json, merges.txt or a .model file."""
    files = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
    if not any(has_file(folder, name) for name in files):
        raise ModelLoadError(
            f"no tokenizer in {folder} (tokenizer.json is missing): pass tokenizer=, "
            "or skip_tokenizer_init=True and token ids"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        backend = tokenizer.backend_tokenizer
    except Exception as error:
        raise ModelLoadError(f"the tokenizer in {folder} can't be loaded: {error}") from error
    fast = FastTokenizer.from_str(backend.to_str())
    specials = [AddedToken(text, special=True) for text in tokenizer.all_special_tokens]
    fast.add_special_tokens(specials)
    return fast
