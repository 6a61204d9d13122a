"""OutputProcessor: token ids of finished or running requests -> `RequestOutput`s with text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nbllm.engine.request import FinishReason, Request
from nbllm.inputs import EncodedPrompt
from nbllm.outputs import CompletionOutput, PositionLogprobs, RequestMetrics, RequestOutput
from nbllm.sampling_params import RequestOutputKind, SamplingParams
from nbllm.tokenizer import IncrementalDetokenizer, Tokenizer


def make_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams
) -> IncrementalDetokenizer:
    """The detokenizer that both the engine's stop check and the reader's text go through."""
    return IncrementalDetokenizer(
        tokenizer,
        prompt_token_ids=prompt_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        stop=tuple(params.stop or ()),
        include_stop_str_in_output=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )


class OutputProcessor:
    """Follows the requests of one prompt and reports them in the form that users get.

    Args:
        prompt: text and token ids.
        requests: one per continuation, in order.
        params: what the user asked for.
        tokenizer: None reports token ids only.
        output_kind: CUMULATIVE reports everything so far, DELTA what is new since the last
            report, FINAL_ONLY reports nothing before the end.
    """

    def __init__(
        self,
        prompt: EncodedPrompt,
        requests: list[Request],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        output_kind: RequestOutputKind,
    ) -> None:
        self.requests = requests
        self._prompt = prompt
        self._params = params
        self._tokenizer = tokenizer
        self._is_delta = output_kind == RequestOutputKind.DELTA
        self._continuations = [
            _Continuation(request, index, params, tokenizer, output_kind)
            for index, request in enumerate(requests)
        ]
        self._by_request = dict(zip(requests, self._continuations, strict=True))

    @property
    def is_finished(self) -> bool:
        """True once all continuations were read to their end."""
        return all(continuation.is_finished for continuation in self._continuations)

    def update(self, request: Request, num_output_tokens: int) -> bool:
        """Read a request up to `num_output_tokens` generated tokens; True if it ended there."""
        continuation = self._by_request[request]
        continuation.read(num_output_tokens)
        return continuation.is_finished

    def reread(self) -> RequestOutput | None:
        """The final report, made from the requests alone; None if not all came to their end.

        For a reader that was interrupted, maybe in the middle of `update` or `report`.
        """
        if any(not r.is_finished or r.finish_reason is FinishReason.ABORT for r in self.requests):
            return None
        final = RequestOutputKind.FINAL_ONLY
        again = OutputProcessor(self._prompt, self.requests, self._params, self._tokenizer, final)
        for request in self.requests:
            again.update(request, request.num_output_tokens)
        return again.report()

    def report(self) -> RequestOutput:
        """What is known now; in DELTA mode only what is new, of continuations with news."""
        first = self.requests[0]
        errors = [request.error for request in self.requests if request.error is not None]
        error = errors[0] if errors else None
        prompt_logprobs: list[PositionLogprobs | None] | None = None
        if self._params.prompt_logprobs is not None:
            prompt_logprobs = first.prompt_logprobs or [None]  # a single token has no other
            for entry in prompt_logprobs:
                _decode_logprobs(entry, self._tokenizer)
        return RequestOutput(
            request_id=first.request_id.split("-")[0],
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            outputs=[c.report() for c in self._continuations if c.has_news or not self._is_delta],
            finished=self.is_finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            metrics=first.metrics,
            error=error if isinstance(error, Exception) else None,
        )


class _Continuation:
    """One continuation: its text so far and how much of it was reported."""

    def __init__(
        self,
        request: Request,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        output_kind: RequestOutputKind,
    ) -> None:
        self.is_finished = False
        self.has_news = False  # since the last report
        self._request = request
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._is_delta = output_kind == RequestOutputKind.DELTA
        self._has_logprobs = params.logprobs is not None or params.logprob_token_ids is not None
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            prompt_ids = request.token_ids[: request.num_prompt_tokens].tolist()
            self._detokenizer = make_detokenizer(tokenizer, prompt_ids, params)
        self._num_read = 0
        self._num_reported = 0
        self._new_text: list[str] = []  # since the last report
        self._cumulative_logprob = 0.0

    def read(self, num_output_tokens: int) -> None:
        request = self._request
        # The engine may be ahead of the mark that is being read: the end is reached when the
        # last token is, not when the request says that it is finished.
        finished = request.is_finished and num_output_tokens == request.num_output_tokens
        begin = request.num_prompt_tokens + self._num_read
        end = request.num_prompt_tokens + num_output_tokens
        if self._has_logprobs:
            for index in range(self._num_read, num_output_tokens):
                token_id = request.token_ids[request.num_prompt_tokens + index]
                self._cumulative_logprob += request.logprobs[index][token_id].logprob
        self._num_read = num_output_tokens
        self.has_news = True
        if self._detokenizer is not None and not self.is_finished:
            visible = end - 1 if finished and self._ends_with_hidden_token() else end
            self._new_text.append(self._detokenizer.push(request.token_ids[begin:visible].tolist()))
            if finished:
                self._new_text.append(self._detokenizer.finish())
        self.is_finished = finished

    def report(self) -> CompletionOutput:
        request = self._request
        text = ""
        if self._detokenizer is not None:
            text = "".join(self._new_text) if self._is_delta else self._detokenizer.text
        first = self._num_reported if self._is_delta else 0
        self._num_reported = self._num_read
        self.has_news = False
        self._new_text.clear()
        start = request.num_prompt_tokens
        logprobs: list[PositionLogprobs] | None = None
        if self._has_logprobs:
            logprobs = request.logprobs[first : self._num_read]
            for entry in logprobs:
                _decode_logprobs(entry, self._tokenizer)
        reason = request.finish_reason if self.is_finished else None
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=request.token_ids[start + first : start + self._num_read].tolist(),
            cumulative_logprob=self._cumulative_logprob if self._has_logprobs else None,
            logprobs=logprobs,
            finish_reason=reason.value if reason is not None else None,
            stop_reason=request.stop_reason if self.is_finished else None,
        )

    def _ends_with_hidden_token(self) -> bool:
        """True if the last token only said "stop": it belongs to `token_ids`, not to the text."""
        request = self._request
        return (
            request.finish_reason is FinishReason.STOP
            and not isinstance(request.stop_reason, str)
            and request.token_ids[-1] in request.stop_ids  # not so at the end of a grammar
            and not self._params.include_stop_str_in_output
        )


def count_cut_texts(outputs: Iterable[RequestOutput], max_model_len: int) -> int:
    """Number of texts that ended because the model's context was full."""
    return sum(
        completion.finish_reason == FinishReason.LENGTH.value
        and len(output.prompt_token_ids) + len(completion.token_ids) >= max_model_len
        for output in outputs
        for completion in output.outputs
    )


def error_output(request_id: str, prompt: EncodedPrompt, error: Exception) -> RequestOutput:
    """The report of a row that could not be run at all."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt.text,
        prompt_token_ids=prompt.token_ids,
        prompt_logprobs=None,
        outputs=[CompletionOutput(0, "", [], finish_reason=FinishReason.ERROR.value)],
        finished=True,
        metrics=RequestMetrics(),
        error=error,
    )


def _decode_logprobs(entry: PositionLogprobs | None, tokenizer: Tokenizer | None) -> None:
    if entry is None or tokenizer is None:
        return
    for token_id, logprob in entry.items():
        if logprob.decoded_token is None:
            logprob.decoded_token = tokenizer.token_text(token_id)


def make_stop_checker(
    tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams
) -> Callable[[list[int]], str | None]:
    """What a `Request` feeds its sampled ids to: it returns the stop string that they complete."""
    detokenizer = make_detokenizer(tokenizer, prompt_token_ids, params)

    def check(token_ids: list[int]) -> str | None:
        detokenizer.push(token_ids)
        return detokenizer.stop_reason

    return check
