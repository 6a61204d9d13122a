"""Packing: the texts of a group in prompts that fit the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nbllm.dataframe.generate_verb import Generate
from nbllm.errors import InvalidRequestError
from nbllm.sampling_params import SamplingParams

_BETWEEN = "\n\n"
_LEAST_ROOM = 32  # tokens of texts in a prompt


class Piece(NamedTuple):
    """A text, and what it stands on.

    Attributes:
        text: of a row, a part of it, or what the model has made of several.
        rows: their positions.
    """

    text: str
    rows: tuple[int, ...] = ()


class Packing:
    """From texts to prompts that fit the context.

    Args:
        verb: renders the prompts.
        params: with `max_tokens` of an answer.
        instruction: stands before the texts.
        numbered: each text of a prompt stands after its number, as in "[1] ".

    Raises:
        InvalidRequestError: two answers do not fit a prompt.
    """

    def __init__(
        self,
        verb: Generate,
        params: SamplingParams,
        instruction: str,
        *,
        numbered: bool = False,
    ) -> None:
        self._verb = verb
        self._instruction = instruction
        self._numbered = numbered
        longest = verb.llm.config.max_model_len
        assert longest is not None and params.max_tokens is not None
        self._limit = longest - params.max_tokens
        around = self._num_tokens([Piece("")])
        self._room = self._limit - around
        if self._room < max(2 * (params.max_tokens + 2), _LEAST_ROOM):
            raise InvalidRequestError(
                f"two summaries of {params.max_tokens} tokens and the instruction ({around} "
                f"tokens) do not fit max_model_len={longest}: lower max_tokens",
                parameter="max_tokens",
            )

    def packs(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """All of the texts, in their order, by prompt; a text that is too long is divided.

        Raises:
            InvalidRequestError: a text can't be tokenized.
        """
        packs: list[list[Piece]] = [[]]
        filled = 0
        for piece, num_tokens in self._counted(pieces):
            if packs[-1] and filled + num_tokens > self._room:
                packs.append([])
                filled = 0
            packs[-1].append(piece)
            filled += num_tokens
        return [fitting for pack in packs for fitting in self._fit(pack)]

    def prompt(self, pack: Sequence[Piece]) -> str:
        """The instruction and the texts; numbers begin with 1 in each prompt."""
        texts = [piece.text for piece in pack]
        if self._numbered:
            texts = [f"[{number}] {text}" for number, text in enumerate(texts, 1)]
        return _BETWEEN.join([self._instruction, *texts])

    def _counted(self, pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
        """Texts that fit a prompt, and the tokens of each with what is between it and the next."""
        counted = []
        # Of a number of three digits: `_fit` counts exactly.
        between = self._count(f"{_BETWEEN}[100] " if self._numbered else _BETWEEN)
        encoded = self._verb.llm._encode([piece.text for piece in pieces])
        for piece, prompt in zip(pieces, encoded, strict=True):
            if prompt.error is not None:
                raise prompt.error
            num_tokens = len(prompt.token_ids) + between
            if num_tokens <= self._room:
                counted.append((piece, num_tokens))
            else:
                counted += self._counted(halves(piece))
        return counted

    def _fit(self, pack: list[Piece]) -> list[list[Piece]]:
        """The pack, divided where the exact count of its prompt says so."""
        if self._num_tokens(pack) <= self._limit:
            return [pack]
        middle = len(pack) // 2
        parts = [pack[:middle], pack[middle:]] if middle else [[half] for half in halves(pack[0])]
        return [fitting for part in parts for fitting in self._fit(part)]

    def _num_tokens(self, pack: Sequence[Piece]) -> int:
        return self._count(self._verb.render(self.prompt(pack)))

    def _count(self, prompt: Any) -> int:
        encoded = self._verb.llm._encode([prompt])[0]
        if encoded.error is not None:
            raise encoded.error
        return len(encoded.token_ids)


def halves(piece: Piece) -> list[Piece]:
    """A text in two, between words if there are any near the middle; both stand on its rows."""
    text = piece.text
    middle = len(text) // 2
    start = text.rfind(" ", middle // 2, middle)
    cut = start if start > 0 else max(middle, 1)
    return [Piece(text[:cut], piece.rows), Piece(text[cut:], piece.rows)]
