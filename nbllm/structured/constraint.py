"""Constraints: the grammars of a model's vocabulary, compiled, and the state of each text.

The work is done by llguidance, which derives from a grammar's state the tokens that may follow
(Geng et al. 2025, arXiv:2501.10868, compares such engines). It leaves the interpreter's lock to
others meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nbllm.errors import InvalidRequestError, RequestFailedError
from nbllm.sampling_params import StructuredOutputsParams
from nbllm.structured.grammar import grammar_text

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_MAX_CACHED = 64  # compiled grammars
_MAX_MESSAGE = 400  # letters of what the compiler has to say
# Of a compilation: 50,000 units of fuel are a millisecond.
_LIMITS = {"initial_lexer_fuel": 2_000_000, "max_lexer_states": 50_000, "verbose_errors": False}
_MANY = 4  # constraints whose masks are worth several threads


class GrammarCompiler:
    """Makes constraints for one model.

    Args:
        tokenizer_json: makes the tokenizer, as `tokenizer.json` has it.
        vocab_size: ids that the model scores; may be more than the tokenizer knows.
        eos_token_ids: any of them may follow a text that is complete.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Constraint:
        """A constraint at the beginning of its text. May take a second: not in an event loop.

        Raises:
            InvalidRequestError: the grammar is wrong, too large, or needs what is not supported;
                says what.
        """
        text = grammar_text(params)
        with self._lock:
            matcher = self._compiled.get(text)
            if matcher is None:
                matcher = self._compile(text)
                self._compiled[text] = matcher
                if len(self._compiled) > _MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(text)
            return Constraint(matcher.deep_copy(), self._vocab_size)

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._wrapped_tokenizer(), text, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # much is done with the first mask only
        if matcher.is_error():
            raise InvalidRequestError(
                f"structured_outputs: {_error_text(matcher)}", parameter="structured_outputs"
            )
        return matcher

    def _wrapped_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            try:
                self._tokenizer = LLTokenizer(
                    self._tokenizer_json(),
                    n_vocab=self._vocab_size,
                    eos_token=self._eos_token_ids or None,
                )
            except Exception as error:  # the library raises bare ones
                raise InvalidRequestError(
                    "structured_outputs: this model's tokenizer can't be constrained "
                    f"({str(error)[:_MAX_MESSAGE]})",
                    parameter="structured_outputs",
                ) from error
        return self._tokenizer


class Constraint:
    """What may follow in one text; the `TokenConstraint` of a request.

    Args:
        matcher: at the beginning of the text; taken over.
        vocab_size: ids that are scored.
    """

    _executor: LLExecutor | None = None

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self.num_mask_words = -(-vocab_size // 32)

    @property
    def is_complete(self) -> bool:
        """True if nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    def accept(self, token_id: int) -> None:
        """Go on by a token.

        Raises:
            RequestFailedError: it was not allowed, or the grammar's state has grown too large.
        """
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    @staticmethod
    def fill_masks(
        constraints: Sequence[Constraint], masks: np.ndarray
    ) -> list[RequestFailedError | None]:
        """Write which ids may follow in each text.

        Args:
            constraints: of the texts.
            masks: [len(constraints), num_mask_words] int32; bit i % 32 of word i // 32 is id i.

        Returns:
            for each text None, or why it can't go on: the grammar's state has grown too large.
        """
        if len(constraints) < _MANY:
            for constraint, mask in zip(constraints, masks, strict=True):
                constraint._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        else:
            if Constraint._executor is None:
                from llguidance import LLExecutor

                Constraint._executor = LLExecutor()
            matchers = [(constraint._matcher, row) for row, constraint in enumerate(constraints)]
            Constraint._executor.unsafe_compute_mask_ptr(
                matchers, masks.ctypes.data, masks.shape[1] * masks.itemsize, len(masks)
            )
        return [c._failure() if c._matcher.is_error() else None for c in constraints]

    def _failure(self) -> RequestFailedError:
        message = _error_text(self._matcher) or "the text left its grammar"
        return RequestFailedError(f"structured_outputs: {message}", parameter="structured_outputs")


def _error_text(matcher: LLMatcher) -> str:
    """What is wrong, in one line that is not too long; empty if it does not say."""
    return " ".join(matcher.get_error().split())[:_MAX_MESSAGE]
