"""What users receive. The names and fields are vLLM's; additions are marked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """The log-probability of one token at one position.

    Attributes:
        logprob: natural logarithm, from the model's raw distribution (before temperature,
            penalties and filters).
        rank: 1 for the most likely token of the vocabulary, 2 for the next, ...
        decoded_token: the token's text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id -> Logprob: the tokens reported at one position."""


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation.

    Attributes:
        index: position among the `n` continuations of the request.
        text: generated text (empty with `detokenize=False`).
        token_ids: generated token ids.
        cumulative_logprob: sum of the log-probabilities of the generated tokens, or None
            if no logprobs were asked for.
        logprobs: one dict per generated token, or None.
        finish_reason: "stop", "length", "repetition", "abort", "error", or None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
        routed_experts, lora_request: for vLLM's sake; None.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    routed_experts: None = None
    lora_request: None = None

    def finished(self) -> bool:
        """True once nothing more will be generated."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic()`; 0.0 means not yet."""

    arrival_time: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    num_preemptions: int = 0

    @property
    def queued_ts(self) -> float:
        """vLLM's name of `arrival_time`."""
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float:
        """vLLM's name of `scheduled_time`."""
        return self.scheduled_time

    @property
    def first_token_ts(self) -> float:
        """vLLM's name of `first_token_time`."""
        return self.first_token_time

    @property
    def last_token_ts(self) -> float:
        """vLLM's name of `finished_time`."""
        return self.finished_time

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token; 0.0 before it."""
        return max(self.first_token_time - self.arrival_time, 0.0)


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt.

    Attributes:
        request_id: unique within the `LLM`.
        prompt: the prompt's text, or None if token ids were given.
        prompt_token_ids: the prompt as the model saw it.
        prompt_logprobs: one entry per prompt token (the first is None), if asked for.
        outputs: `n` continuations, in order.
        finished: True once all continuations ended.
        metrics: times of this request.
        num_cached_tokens: prompt tokens found in the prefix cache.
        lora_request, encoder_prompt, encoder_prompt_token_ids, kv_transfer_params: for vLLM's
            sake; None.
        error: (addition) why this request failed, or None. The other requests of the
            same call are not affected.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: int = 0
    kv_transfer_params: None = None
    error: Exception | None = None


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of one prompt.

    Attributes:
        embedding: one number per dimension; none if the request failed.
    """

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Dimensions of the vector."""
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The answer of `LLM.embed` to one prompt.

    Attributes:
        request_id: unique within the `LLM`.
        outputs: the vector.
        prompt_token_ids: the prompt as the model saw it.
        finished: True.
        num_cached_tokens: prompt tokens found in the prefix cache.
        prompt: (addition) the prompt's text, or None if token ids were given, or if it was cut.
        metrics: (addition) times of this request.
        error: (addition) why this request failed, or None. The other requests of the same call are
            not affected.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """(addition) A request in flight, as it was when it was looked at.

    Attributes:
        request_id: unique within the `LLM`; "7-1" is the second continuation of prompt 7.
        source: who asked: "cell", "dataframe", "server" or "widget".
        status: "waiting" or "running".
        num_prompt_tokens: of the prompt.
        num_output_tokens: generated so far.
        max_tokens: upper bound on generated tokens; 0 if the prompt is embedded.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_blocks: pages of the KV cache that it reads, shared ones too.
        num_preemptions: how often it had to give its pages back.
        age_s: seconds since it was made.
    """

    request_id: str
    source: str
    status: str
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_cached_tokens: int
    num_blocks: int
    num_preemptions: int
    age_s: float


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """(addition) What `LLM.snapshot` sees: all of one moment, between two steps.

    Attributes:
        metrics: counters and gauges, as of `LLM.get_metrics`.
        requests: in flight; those that run, then those that wait, in the order of their arrival.
        num_by_source: how many there are, also of those that are not listed, by `source`.
        block_size: tokens in a page of the KV cache.
        num_blocks: pages.
        num_used_blocks: of those, the ones that requests hold.
        num_cached_blocks: of the others, the ones with a prefix that can be found again.
    """

    metrics: dict[str, float | int]
    requests: tuple[RequestSnapshot, ...]
    num_by_source: dict[str, int]
    block_size: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: prompt and continuation together, as vLLM reports it.

    Attributes:
        tokens: ids of the prompt and the continuation.
        cum_logprob: sum of the log-probabilities of the continuation's tokens.
        logprobs: one dict per generated token.
        text: of all tokens; None without a tokenizer.
        finish_reason: "stop" or "length".
        stop_reason: the end-of-sequence id, if it ended with one.
    """

    tokens: list[int]
    cum_logprob: float
    logprobs: list[PositionLogprobs]
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]
