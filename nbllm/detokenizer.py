"""IncrementalDetokenizer: token ids to text as they come, and the hunt for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbllm.stop_strings import StopFinder

if TYPE_CHECKING:
    from nbllm.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # of the prompt: decoders treat the first token of a text differently
_MIN_TOKENS_AT_ONCE = 3
_MAX_CHAR_TOKENS = 4  # a character has at most so many bytes, so it is spread over so many tokens


class IncrementalDetokenizer:
    """Text of a growing list of token ids.

    A token may end in the middle of a UTF-8 sequence, and its text may depend on the token before
    it. So a small window of tokens is decoded twice, with and without the new ones, and the
    difference is the new text; it is held back while it ends in an incomplete character or in
    what may be the beginning of a stop string. The cost per token does not grow with the text.

    The text does not depend on how the ids are divided among calls of `push`.

    Args:
        tokenizer: decodes.
        prompt_token_ids: context that the output continues.
        skip_special_tokens: leave special tokens out.
        stop: strings that end the text.
        include_stop_str_in_output: cut after the stop string instead of before it.
        min_tokens: stop strings that end within this many first tokens do not count.

    Attributes:
        stop_reason: the stop string that was found, or None; afterwards nothing is added.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.all_special_ids if skip_special_tokens else frozenset[int]()
        self._finder = StopFinder(stop) if stop else None
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []  # released
        self._num_released = 0  # characters
        self._held = ""  # may be the beginning of a stop string
        tail = [i for i in prompt_token_ids[-4 * _CONTEXT_TOKENS :] if i not in self._skipped_ids]
        self._window = tail[-_CONTEXT_TOKENS:]
        self._num_read = len(self._window)  # tokens of the window whose text is out
        self._read_text = self._decode(self._window)

    @property
    def text(self) -> str:
        """What is certain so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def num_chars(self) -> int:
        """Length of `text`."""
        return self._num_released

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new ids; returns the text that became certain."""
        num_pieces = self._begin()
        if len(token_ids) >= _MIN_TOKENS_AT_ONCE and self._read_at_once(token_ids):
            return "".join(self._pieces[num_pieces:])
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self._num_tokens += 1
            if token_id not in self._skipped_ids:
                self._read(token_id)
        return "".join(self._pieces[num_pieces:])

    def finish(self) -> str:
        """The text ends here: returns what was held back."""
        num_pieces = self._begin()
        if self.stop_reason is None and len(self._window) > self._num_read:
            self._emit(self._decode(self._window)[len(self._read_text) :])
            self._num_read = len(self._window)
        if self.stop_reason is None:
            self._release(len(self._held))
        return "".join(self._pieces[num_pieces:])

    def _begin(self) -> int:
        if len(self._pieces) > 1000:
            self._pieces = ["".join(self._pieces)]
        return len(self._pieces)

    def _read_at_once(self, token_ids: Sequence[int]) -> bool:
        """Take many ids in one go, if that gives the same; False if it is not known to.

        The bytes of byte-level tokens lie one behind the other. As long as no character is
        incomplete, and nobody looks for its end, the text is theirs.
        """
        if self._finder is not None or not self._tokenizer.is_byte_level:
            return False
        ids = self._window + [i for i in token_ids if i not in self._skipped_ids]
        text = self._decode(ids)
        start = len(self._read_text)
        if not text.startswith(self._read_text) or _REPLACEMENT in text[start:]:
            return False
        self._num_tokens += len(token_ids)
        self._emit(text[start:])
        self._window = ids[-_CONTEXT_TOKENS:]
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)
        return True

    def _read(self, token_id: int) -> None:
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) > len(self._read_text) and not text.endswith(_REPLACEMENT):
            self._emit(text[len(self._read_text) :])
            self._advance(len(self._window))
        elif self._tokenizer.convert_ids_to_tokens([token_id]) == [None]:
            self._window.pop()  # models have more ids than their tokenizers
        elif len(self._window) - self._num_read >= _MAX_CHAR_TOKENS:
            self._read_incomplete(text)

    def _read_incomplete(self, text: str) -> None:
        """Too many tokens for one character: the first of them are not UTF-8, or have no text.

        Read as many as possible but the last, which may begin a character.
        """
        for count in range(len(self._window) - 1, self._num_read, -1):
            part = self._decode(self._window[:count])
            if part == text and part != self._read_text:
                continue  # its last character may be the incomplete one
            later = self._decode(self._window[self._num_read :])
            context = self._decode(self._window[self._num_read : count])
            if text.startswith(part) and later.startswith(context):
                self._emit(part[len(self._read_text) :])
                self._advance(count)
                return
        if len(self._window) - self._num_read > 4 * _MAX_CHAR_TOKENS:
            self._emit(text[len(self._read_text) :])
            self._advance(len(self._window))

    def _advance(self, count: int) -> None:
        """The tokens just read, those before `count`, become the context of the next ones."""
        context = self._window[self._num_read : count]
        self._window = self._window[self._num_read :]
        self._num_read = len(context)
        self._read_text = self._decode(context)

    def _emit(self, new: str) -> None:
        self._held += new
        if self._finder is None:
            self._release(len(self._held))
            return
        may_match = self._num_tokens > self._min_tokens
        hit = self._finder.feed(new, may_match=may_match)
        if hit is None:
            self._release(self._finder.open_from - self._num_released)
            return
        start, self.stop_reason = hit
        end = start + (len(self.stop_reason) if self._include_stop else 0)
        self._release(end - self._num_released)
        self._held = ""

    def _release(self, count: int) -> None:
        if count > 0:
            self._pieces.append(self._held[:count])
            self._held = self._held[count:]
            self._num_released += count

    def _decode(self, ids: Sequence[int]) -> str:
        # Special tokens to be skipped are not among the ids.
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
