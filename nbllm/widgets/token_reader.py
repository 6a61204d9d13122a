"""TokenReader: what each generated token adds to the text, and what could have been said."""

from __future__ import annotations

from collections.abc import Sequence

from nbllm.outputs import PositionLogprobs
from nbllm.tokenizer import Tokenizer
from nbllm.widgets.branch_tree import Alternative, Token

_MAX_CHAR_TOKENS = 4  # as many as a character may have bytes


class TokenReader:
    """Reads the tokens of one continuation, in their order.

    A token alone has not always the text that it has in its place: some tokenizers drop the space
    before it, and a character may be spread over several tokens, the last of which then has it as
    its text. So a token is decoded with those before it.

    Args:
        tokenizer: of the model.
        context: the ids before the first token to be read.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.all_special_ids
        self._context: list[int] = []  # the tokens of the last whole characters
        self._pending: list[int] = []  # those of a character that is not complete
        for token_id in context[-2 * _MAX_CHAR_TOKENS :]:
            self._advance(token_id)

    def read(
        self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs] | None = None
    ) -> list[Token]:
        """The tokens of some ids.

        Args:
            token_ids: what comes next.
            logprobs: of each position, as the engine reports them; None for tokens that a person
                wrote.
        """
        return [
            self._read(token_id, None if logprobs is None else logprobs[index])
            for index, token_id in enumerate(token_ids)
        ]

    def _read(self, token_id: int, position: PositionLogprobs | None) -> Token:
        alternatives: list[Alternative] = []
        for other_id, entry in (position or {}).items():
            text = self._piece(other_id) or self._tokenizer.token_text(other_id)
            alternatives.append(Alternative(other_id, text, entry.logprob))
        alternatives.sort(key=lambda alternative: -alternative.logprob)
        return Token(
            token_id,
            self._advance(token_id),
            position[token_id].logprob if position is not None else None,
            tuple(alternatives),
            token_id in self._special_ids,
        )

    def _advance(self, token_id: int) -> str:
        text = self._piece(token_id)
        self._pending.append(token_id)
        if text or len(self._pending) == _MAX_CHAR_TOKENS:  # some tokens have no text at all
            self._context, self._pending = self._pending, []
        return text

    def _piece(self, token_id: int) -> str:
        """What a token adds here; nothing while its character is not complete."""
        known = self._decode(self._context)
        text = self._decode([*self._context, *self._pending, token_id])[len(known) :]
        is_open = text.endswith("\ufffd") and len(self._pending) < _MAX_CHAR_TOKENS - 1
        return "" if is_open else text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
