"""IncrementalDetokenizer: token ids to text as they come, and the hunt for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbllm.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # of the prompt: decoders treat the first token of a text differently
_MAX_PENDING = 12  # tokens after which incomplete UTF-8 is invalid UTF-8: 4 bytes, some spare


class IncrementalDetokenizer:
    """Text of a growing list of token ids.

    A token may end in the middle of a UTF-8 sequence, and its text may depend on the token before
    it. So a small window of tokens is decoded twice, with and without the new ones, and the
    difference is the new text; it is held back while it ends in an incomplete character or in
    what may be the beginning of a stop string. The cost per token does not grow with the text.

    Args:
        tokenizer: decodes.
        prompt_token_ids: context that the output continues.
        skip_special_tokens: leave special tokens out.
        stop: strings that end the text.
        include_stop_str_in_output: cut after the stop string instead of before it.
        min_tokens: stop strings that end within this many first tokens do not count.

    Attributes:
        text: what is certain so far.
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
        self.text = ""
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._decoded = ""  # all text, also what is held back for a stop string
        self._search_from = 0
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._window = context
        self._num_read = len(context)  # tokens of the window whose text is out
        self._read_text = self._decode(context)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new ids; returns the text that became certain."""
        before = len(self.text)
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self._num_tokens += 1
            self._push_one(token_id)
        return self.text[before:]

    def finish(self) -> str:
        """The text ends here: returns what was held back."""
        before = len(self.text)
        if self.stop_reason is None:
            if len(self._window) > self._num_read:
                self._emit(self._decode(self._window)[len(self._read_text) :])
            if self.stop_reason is None:
                self.text = self._decoded
        return self.text[before:]

    def _push_one(self, token_id: int) -> None:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_read < _MAX_PENDING:
            return  # an incomplete character, so far
        self._emit(text[len(self._read_text) :])
        # The tokens just read become the context of the next ones.
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)

    def _emit(self, new: str) -> None:
        self._decoded += new
        if not self._stop:
            self.text = self._decoded
            return
        if self._num_tokens <= self._min_tokens:
            self._search_from = len(self._decoded)
            self.text = self._decoded
            return
        found = [(self._find(stop), stop) for stop in self._stop]
        hits = [(position, stop) for position, stop in found if position >= 0]
        if hits:
            position, self.stop_reason = min(hits)
            end = position + (len(self.stop_reason) if self._include_stop else 0)
            self.text = self._decoded[:end]
            return
        longest = max(len(stop) for stop in self._stop)
        self._search_from = max(self._search_from, len(self._decoded) - longest + 1)
        self.text = self._decoded[: len(self._decoded) - self._held_back()]

    def _find(self, stop: str) -> int:
        return self._decoded.find(stop, self._search_from)

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        tail = self._decoded[self._search_from :]
        for length in range(len(tail), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop):
                return length
        return 0

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens) if ids else ""
