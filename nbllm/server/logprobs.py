"""Log-probabilities in the forms of OpenAI's replies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbllm.outputs import Logprob, PositionLogprobs
    from nbllm.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity


class LogprobsWriter:
    """Writes the log-probabilities of one choice, piece by piece.

    Args:
        tokenizer: for the texts of tokens.
        num_top: how many of the most likely tokens are listed at each position.
        tokens_as_ids: write "token_id:N" instead of a token's text.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, tokens_as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._tokens_as_ids = tokens_as_ids
        self._offset = 0  # of the next token in the choice's text

    @staticmethod
    def begin() -> dict[str, list[Any]]:
        """The `logprobs` of a choice of completions, to be filled by `add_to`."""
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add_to(
        self,
        body: dict[str, list[Any]],
        token_ids: Sequence[int],
        entries: Sequence[PositionLogprobs | None],
        hidden_ids: Collection[int],
    ) -> None:
        """Add tokens to the `logprobs` of a choice of completions.

        Args:
            body: what is added to.
            token_ids: the tokens that follow those of the last call, for whatever body.
            entries: one for each; None for the first token of a prompt.
            hidden_ids: tokens that are not in the choice's text.
        """
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = self.token_text(token_id)
            body["tokens"].append(f"token_id:{token_id}" if self._tokens_as_ids else text)
            body["text_offset"].append(self._offset)
            self._offset += 0 if token_id in hidden_ids else len(text)
            if entry is None:
                body["token_logprobs"].append(None)
                body["top_logprobs"].append(None)
                continue
            # OpenAI's promise: the chosen token is there, if it is not among the top ones too.
            listed = dict(self._top(entry)) | {token_id: entry[token_id]}
            top = {self._text(i, e): _finite(e.logprob) for i, e in listed.items()}
            body["token_logprobs"].append(_finite(entry[token_id].logprob))
            body["top_logprobs"].append(top)

    def for_chat(
        self, token_ids: Sequence[int], entries: Sequence[PositionLogprobs]
    ) -> dict[str, Any]:
        """The `logprobs` of a choice of a chat."""
        return {
            "content": [
                self._position(token_id, entry[token_id])
                | {"top_logprobs": [self._position(i, e) for i, e in self._top(entry)]}
                for token_id, entry in zip(token_ids, entries, strict=True)
            ],
            "refusal": None,
        }

    def _top(self, entry: PositionLogprobs) -> list[tuple[int, Logprob]]:
        ranked = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))
        return ranked[: self._num_top]

    def _position(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        text = self.token_text(token_id)
        return {
            "token": self._text(token_id, entry),
            "logprob": _finite(entry.logprob),
            "bytes": list(text.encode("utf-8", "replace")),
        }

    def _text(self, token_id: int, entry: Logprob) -> str:
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        if entry.decoded_token is not None:
            return entry.decoded_token
        return self.token_text(token_id)

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own."""
        return self._tokenizer.token_text(token_id)


def prompt_logprobs_body(
    prompt_logprobs: Sequence[PositionLogprobs | None] | None,
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: token id -> logprob, rank and text, for each token of a prompt."""
    if prompt_logprobs is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _finite(item.logprob),
                "rank": item.rank,
                "decoded_token": item.decoded_token,
            }
            for token_id, item in entry.items()
        }
        for entry in prompt_logprobs
    ]


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
