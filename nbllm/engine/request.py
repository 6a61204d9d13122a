"""Request: one sequence of tokens on its way through the engine.

    WAITING ──admit──> RUNNING ──finish──> FINISHED
       ^                  │
       └─────preempt──────┘

There is no prefill or decode state. `num_computed_tokens` says how many tokens have their keys
and values in the cache; every step computes some more, and whenever it reaches the last token a new
one is sampled, or the prompt is embedded if that is wanted. A prompt with `n` continuations is `n`
requests; the first is the `leader` whose prompt pages the others share.

Steps are booked when they are scheduled, not when their result is known: the host may be ahead of
the device. So `num_computed_tokens` includes what enqueued steps compute, and
`num_output_placeholders` counts the tokens that they sample, which nobody has seen yet.
"""

from __future__ import annotations

import enum
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nbllm.errors import RequestFailedError
from nbllm.outputs import PositionLogprobs, RequestMetrics
from nbllm.pooling_params import PoolingParams
from nbllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

MAX_DEVICE_LOGPROBS = 20
"""Most likely tokens that a captured step reports; a request that wants more is served without."""

MAX_STOP_IDS = 8
"""Token ids for which the device looks; a request with more of them is ended by the host alone."""

StopChecker = Callable[[list[int]], str | None]
"""Fed with newly sampled ids; returns the stop string that they complete, or None."""


class TokenConstraint(Protocol):
    """A grammar that a text must follow, and how far it has come.

    Attributes:
        num_mask_words: 32-bit words of a mask over the vocabulary.
    """

    num_mask_words: int

    @property
    def is_complete(self) -> bool:
        """True if nothing but the end can follow."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token; raises RequestFailedError for one that is not allowed."""
        ...

    @staticmethod
    def fill_masks(
        constraints: Sequence[Any], masks: np.ndarray
    ) -> list[RequestFailedError | None]:
        """Write which ids may follow in each text, to masks [N, num_mask_words] int32: bit i % 32
        of word i // 32 is id i. Returns for each text None, or why it can't go on."""
        ...


class RequestStatus(enum.Enum):
    """Where a request is; see the drawing above."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(str, enum.Enum):
    """Why a request ended; the value is what users and API clients see."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


@dataclass(slots=True, eq=False)
class Request:
    """State of one sequence. Only the engine's thread writes it once it is submitted.

    Attributes:
        request_id: unique within an engine.
        token_ids: the prompt's token ids, then the generated ones, as an array of C numbers, which
            are compared, copied and sent to the device by the piece.
        num_prompt_tokens: how many of `token_ids` are the prompt.
        sampling_params: what the user asked for.
        max_tokens: upper bound on generated tokens, at least 1, already fitted to the context.
        seed: 64-bit seed; the token at position p is drawn with noise that depends on
            (seed, p) alone.
        eos_token_ids: end-of-sequence ids; empty with `ignore_eos`.
        priority: lower runs first under the priority policy.
        arrival_index: position in the order of arrival; the engine sets it.
        leader: the request whose prompt pages this one waits for, or None.
        cache_salt: requests share cached pages only within the same salt.
        restart_len: the number of tokens at which the whole text is computed again, or None; see
            `nbllm.models.rope`.
        restart_cache_salt: the salt from then on.
        bad_words_token_ids: token sequences that may not be completed.
        constraint: what its output must follow, or None.
        stop_checker: called with newly sampled ids; returns the stop string they complete, if any.
        streaming: whether the reader wants to hear of every token or only of the end.
        source: who asked, see `nbllm.request_source`.
        pooling_params: what is wanted is an embedding of the prompt; None wants tokens. It is
            booked as if it were the one token that the request samples, but is none.
        stop_ids: token ids that end the text, `min_tokens` permitting.
        has_penalties: whether the tokens of the sequence so far change the logits.
        reports_logprobs: whether more is reported of its tokens than their ids.
        reads_hidden_states: more is made of the prompt's hidden states than the first token.
        max_num_tokens: prompt and generated tokens together, once it ends by length.
        needs_known_tokens: the host must have seen the last token before the next is computed.
        ends_on_host: only the host can tell whether a token ends the text: every step that is run
            before it has seen the token may be one too many.
        is_finished: nothing more will be generated. It becomes true after all else is set: readers
            in other threads go by it.
        num_computed_tokens: tokens whose keys and values are in the cache once all enqueued steps
            have run.
        num_output_placeholders: tokens that enqueued steps sample; an end that only their values
            tell of may come before the last of them.
        embedding: [output_size] float32, neither cut nor normalized; None until the end.
    """

    request_id: str
    token_ids: array[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    max_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival_index: int = -1
    leader: Request | None = None
    cache_salt: int = 0
    restart_len: int | None = None
    restart_cache_salt: int = 0
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    constraint: TokenConstraint | None = None
    stop_checker: StopChecker | None = None
    streaming: bool = False
    source: str = "cell"
    pooling_params: PoolingParams | None = None
    stop_ids: list[int] = field(init=False)
    has_penalties: bool = field(init=False)
    reports_logprobs: bool = field(init=False)
    reads_hidden_states: bool = field(init=False)
    max_num_tokens: int = field(init=False)
    needs_known_tokens: bool = field(init=False)
    ends_on_host: bool = field(init=False)
    _min_num_tokens: int = field(init=False)  # prompt and generated tokens before it may stop
    _always_shapes_logits: bool = field(init=False)

    status: RequestStatus = RequestStatus.WAITING
    is_finished: bool = False
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_cached_tokens: int = 0
    restarted_len: int = 0  # tokens that it had when it was computed again as a whole
    block_table: list[int] = field(default_factory=list)
    prefix_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: BaseException | None = None
    cumulative_logprob: float = 0.0
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    embedding: np.ndarray | None = None
    metrics: RequestMetrics = field(
        default_factory=lambda: RequestMetrics(arrival_time=time.monotonic())
    )

    def __post_init__(self) -> None:
        params = self.sampling_params
        self.stop_ids = sorted({*self.eos_token_ids, *(params.stop_token_ids or ())})
        self.has_penalties = (
            params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.repetition_penalty != 1.0
        )
        self.max_num_tokens = self.num_prompt_tokens + self.max_tokens
        self._min_num_tokens = self.num_prompt_tokens + params.min_tokens
        self._watch_host()
        num_logprobs = params.logprobs or 0
        self.reports_logprobs = params.logprobs is not None or params.logprob_token_ids is not None
        self.reads_hidden_states = (
            self.pooling_params is not None or params.prompt_logprobs is not None
        )
        self._always_shapes_logits = (
            not 0 <= num_logprobs <= MAX_DEVICE_LOGPROBS
            or params.logprob_token_ids is not None
            or params.allowed_token_ids is not None
            or bool(params.logit_bias)
            or bool(self.bad_words_token_ids)
            or self.constraint is not None
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens together, as far as they are known."""
        return len(self.token_ids)

    @property
    def num_booked_tokens(self) -> int:
        """The same with the tokens that enqueued steps sample."""
        return len(self.token_ids) + self.num_output_placeholders

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated token ids (a copy)."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def is_decoding(self) -> bool:
        """True if all that is left to compute is the token sampled last."""
        num_computed = self.num_computed_tokens
        num_left = len(self.token_ids) + self.num_output_placeholders - num_computed
        return num_left == 1 and num_computed >= self.num_prompt_tokens

    @property
    def is_booked_out(self) -> bool:
        """True if enqueued steps take it to its full length, should nothing end it before."""
        return len(self.token_ids) + self.num_output_placeholders >= self.max_num_tokens

    @property
    def has_computed_prompt(self) -> bool:
        """True once the whole prompt is, or was, in the cache: followers may start."""
        return self.num_computed_tokens >= self.num_prompt_tokens or self.is_finished

    @property
    def may_read_prefix_cache(self) -> bool:
        """Prompt log-probabilities and means need every prompt token computed."""
        params = self.sampling_params
        if self.pooling_params is not None and self.pooling_params.pooling == "mean":
            return False
        return params.prompt_logprobs is None and not params.skip_reading_prefix_cache

    @property
    def shapes_logits(self) -> bool:
        """True if the host has a word in which token is next, or a report of it is wanted that only
        the host can ask for: the step can't run on the device alone."""
        return self._always_shapes_logits or self.num_booked_tokens < self._min_num_tokens

    def start_running(self) -> None:
        """WAITING -> RUNNING."""
        self._expect(RequestStatus.WAITING)
        self.status = RequestStatus.RUNNING
        if not self.metrics.scheduled_time:
            self.metrics.scheduled_time = time.monotonic()

    def preempt(self) -> None:
        """RUNNING -> WAITING: its pages are gone, its tokens will be computed again."""
        self._expect(RequestStatus.RUNNING)
        assert not self.num_output_placeholders, "a step that it is in has not ended"
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.metrics.num_preemptions += 1

    def begin_restart(self) -> None:
        """From now on the text so far counts as one prompt, in whatever rotates by its length."""
        self.restarted_len = self.num_tokens
        self.cache_salt = self.restart_cache_salt
        self.restart_len = None
        self._watch_host()

    def finish(self, reason: FinishReason, *, stop_reason: int | str | None = None) -> None:
        """WAITING or RUNNING -> FINISHED."""
        if self.is_finished:
            raise RuntimeError(f"request {self.request_id} is finished already")
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.metrics.finished_time = time.monotonic()
        self.status = RequestStatus.FINISHED
        self.is_finished = True

    def extend(self, token_ids: list[int]) -> None:
        """Take sampled tokens, up to the first that ends the text.

        Token ids are checked here; stop strings by `stop_checker`, which sees text.
        """
        if not token_ids:
            return
        if not self.metrics.first_token_time:
            self.metrics.first_token_time = time.monotonic()
        if self.ends_on_host or len(self.token_ids) < self._min_num_tokens:
            for token_id in token_ids:
                self.token_ids.append(token_id)
                self._check_end()
                if self.is_finished:
                    return
        else:  # the device stopped by the same rules: only the last can be an end
            self.token_ids.extend(token_ids)
            self._check_end()

    def _watch_host(self) -> None:
        """See what the host is needed for."""
        restarts = self.restart_len is not None
        constrained = self.constraint is not None
        self.needs_known_tokens = restarts or constrained or bool(self.bad_words_token_ids)
        self.ends_on_host = (
            restarts
            or constrained
            or self.stop_checker is not None
            or self.sampling_params.repetition_detection is not None
            or len(self.stop_ids) > MAX_STOP_IDS
        )

    def _check_end(self) -> None:
        """Finish if the last token ends the text."""
        token_id, num_tokens = self.token_ids[-1], len(self.token_ids)
        stop_string = self.stop_checker([token_id]) if self.stop_checker is not None else None
        if self.constraint is not None:
            self.constraint.accept(token_id)
        if num_tokens >= self._min_num_tokens:
            if token_id in self.stop_ids:
                is_eos = token_id in self.eos_token_ids
                self.finish(FinishReason.STOP, stop_reason=None if is_eos else token_id)
                return
            if stop_string is not None:
                self.finish(FinishReason.STOP, stop_reason=stop_string)
                return
        if self.constraint is not None and self.constraint.is_complete:
            self.finish(FinishReason.STOP)  # whatever min_tokens says: no token is left
        elif num_tokens >= self.max_num_tokens:
            self.finish(FinishReason.LENGTH)
        elif self.sampling_params.repetition_detection is not None and self._repeats():
            self.finish(FinishReason.REPETITION)

    def _repeats(self) -> bool:
        """True if the output ends in `min_count` copies of one pattern of an allowed size."""
        detection = self.sampling_params.repetition_detection
        assert detection is not None
        end = len(self.token_ids)
        for size in range(max(detection.min_pattern_size, 1), detection.max_pattern_size + 1):
            start = end - size * detection.min_count
            if start < self.num_prompt_tokens:
                break
            if self.token_ids[start : end - size] == self.token_ids[start + size : end]:
                return True
        return False

    def _expect(self, status: RequestStatus) -> None:
        if self.status is not status:
            raise RuntimeError(
                f"request {self.request_id} is {self.status.value}, expected {status.value}"
            )
