"""PrefixEncoder: texts that begin alike are tokenized once as far as they do.

The rows of a DataFrame share a template, which is most of each text. Where may such a text be cut
in two, so that the ids of the parts are those of the whole?

A tokenizer with a regular expression splits a text into words, from left to right and without a
look behind a word's beginning, and merges within words alone. A word is settled once the expression
has seen what follows it. So a cut at the beginning of a word is right for all texts that agree
until well behind it: until more has followed than an expression looks at, or than a special token
has characters. Tokenizers that merge across a whole text are left alone, as are normalizers that
look at the whole of it; and two texts of every batch are tokenized both ways.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

_MARGIN = 64  # characters that all texts share behind a cut, at least
_MIN_HEAD = 192  # characters before it, or it does not pay
_MAX_TRIES = 8  # beginnings of words that are tried as a cut
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}  # look at neighbours only
_SPLITTERS = {"Split", "ByteLevel", "Digits", "Punctuation"}


class PrefixEncoder:
    """Encodes batches of texts.

    Args:
        fast: the tokenizer; it neither truncates nor pads.
    """

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._cuts = _splits_into_words(json.loads(fast.to_str()))
        added = fast.get_added_tokens_decoder().values()
        self._margin = max([_MARGIN, *(2 * len(token.content) for token in added)])

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of each text, as `Tokenizer.encode` gives them."""
        head = self._find_head(texts, add_special_tokens) if len(texts) > 2 else None
        if head is None:
            return self._encode(texts, add_special_tokens)
        ids, length = head
        return [ids + tail for tail in self._encode([text[length:] for text in texts], False)]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _find_head(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> tuple[list[int], int] | None:
        """Ids of what all texts begin with, and its characters; None if there is no such thing."""
        first, last = min(texts), max(texts)  # all others lie between these two
        limit = _num_common(first, last) - self._margin
        if not self._cuts or limit < _MIN_HEAD:
            return None
        whole: Encoding = self._fast.encode(first, add_special_tokens=add_special_tokens)
        for index, length in _word_beginnings(whole, limit):
            head = self._fast.encode(first[:length], add_special_tokens=add_special_tokens).ids
            if head != whole.ids[:index]:
                continue
            if all(
                head + self._fast.encode(text[length:], add_special_tokens=False).ids
                == self._fast.encode(text, add_special_tokens=add_special_tokens).ids
                for text in (first, last)
            ):
                return head, length
        return None


def _num_common(first: str, last: str) -> int:
    """Characters that two texts begin with in common."""
    low, high = 0, min(len(first), len(last))
    while low < high:  # by halves: comparing slices is fast
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _word_beginnings(encoding: Encoding, limit: int) -> list[tuple[int, int]]:
    """Tokens that begin a word, and the characters before them, latest first.

    Offsets may leave out a space that belongs to the word.
    """
    found: list[tuple[int, int]] = []
    words, offsets = encoding.word_ids, encoding.offsets
    for index in range(len(words) - 1, 0, -1):
        begin = offsets[index][0]
        if begin <= limit and words[index] is not None and words[index] != words[index - 1]:
            found += [(index, begin), (index, begin - 1)]
            if len(found) >= 2 * _MAX_TRIES:
                break
    return found


def _splits_into_words(description: dict[str, Any]) -> bool:
    normalizers = _flatten(description.get("normalizer"), "normalizers")
    splitters = _flatten(description.get("pre_tokenizer"), "pretokenizers")
    splits = any(
        part["type"] == "Split" or (part["type"] == "ByteLevel" and part.get("use_regex", True))
        for part in splitters
    )
    return (
        splits
        and all(part["type"] in _SPLITTERS for part in splitters)
        and not any(part.get("add_prefix_space") for part in splitters)
        and all(part["type"] in _LOCAL_NORMALIZERS for part in normalizers)
        and description.get("model", {}).get("type") == "BPE"
    )


def _flatten(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
