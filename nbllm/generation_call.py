"""GenerationCall: the rows of one call on their way through the engine, whoever waits for them.

`LLM.generate`, `stream`, `agenerate`, `astream`, the DataFrame accessor and the server are all
loops around one of these; they differ in how they wait. Rows are taken from the caller's iterable
only as fast as the engine needs them, so a call over a million rows holds a few thousand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

from nbllm.engine.request_stream import Progress, RequestStream
from nbllm.errors import InvalidRequestError, NbllmError
from nbllm.inputs import EncodedPrompt
from nbllm.output_processor import OutputProcessor, count_cut_texts, error_output
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nbllm.engine.engine_thread import EngineThread
    from nbllm.engine.request import Request
    from nbllm.inputs import RequestFactory
    from nbllm.progress import ProgressBar
    from nbllm.tokenizer import Tokenizer

_CHUNK = 256  # rows tokenized at once

Row = tuple[object, SamplingParams, int]
"""A prompt as the user wrote it, its sampling parameters, its priority."""


class GenerationCall:
    """Rows in, `(row number, RequestOutput)` out.

    Use as a context manager: leaving it aborts what still runs.

    Args:
        rows: taken lazily.
        encode: many prompts -> `EncodedPrompt`s.
        factory: makes the requests.
        thread: runs them.
        tokenizer: for the texts, or None.
        max_in_flight: rows submitted and not yet finished.
        output_kind: FINAL_ONLY yields each row once; otherwise each change of a row.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        encode: Callable[[list[object]], list[EncodedPrompt]],
        factory: RequestFactory,
        thread: EngineThread,
        tokenizer: Tokenizer | None,
        max_in_flight: int,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> None:
        self.stream = RequestStream()
        self._rows = iter(rows)
        self._encode = encode
        self._factory = factory
        self._thread = thread
        self._tokenizer = tokenizer
        self._max_in_flight = max_in_flight
        self._output_kind = output_kind
        self._active: dict[Request, tuple[int, OutputProcessor]] = {}
        self._untaken: dict[int, OutputProcessor] = {}  # rows whose end nobody has taken yet
        self._num_rows = 0
        self._num_in_flight = 0
        self._exhausted = False
        self._failed: list[tuple[int, RequestOutput]] = []

    def __enter__(self) -> GenerationCall:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_waiting(self) -> bool:
        """True if results will arrive on `stream`; False if everything was reported."""
        return self._num_in_flight > 0

    def close(self) -> None:
        """Abort what still runs. Idempotent."""
        self._exhausted = True
        if self._active:
            self._thread.abort(list(self._active))
            self._active.clear()
            self._num_in_flight = 0

    def run(self, keep: Callable[[int, RequestOutput], None], bar: ProgressBar) -> None:
        """Run all rows and hand each output to `keep`; on an interrupt some of them once more."""
        try:
            for number, output in self.results():
                keep(number, output)
                bar.update(1, **token_counts(output))
        except KeyboardInterrupt:
            for number, output in self._salvage():
                keep(number, output)
            raise

    def results(self) -> Iterator[tuple[int, RequestOutput]]:
        """Run all rows; yields what `submit` and `absorb` do."""
        yield from self.submit()
        while self.is_waiting:
            yield from self.absorb(self.stream.take())
            yield from self.submit()

    def submit(self) -> Iterator[tuple[int, RequestOutput]]:
        """Keep the engine supplied; yields the rows that failed before they reached it."""
        while not self._exhausted and self._num_in_flight <= self._max_in_flight - _CHUNK // 2:
            chunk = list(islice(self._rows, min(_CHUNK, self._max_in_flight)))
            if not chunk:
                self._exhausted = True
                break
            self._submit_chunk(chunk)
            yield from self._failed
            self._failed.clear()

    def absorb(self, progress: list[Progress]) -> Iterator[tuple[int, RequestOutput]]:
        """Turn what `stream` delivered into outputs."""
        changed: dict[int, OutputProcessor] = {}
        for request, num_output_tokens in progress:
            if request not in self._active:
                continue
            number, processor = self._active[request]
            if processor.update(request, num_output_tokens):
                del self._active[request]
            changed[number] = processor
        for number, processor in changed.items():
            finished = processor.is_finished
            if finished:
                self._num_in_flight -= 1
            if finished or self._output_kind != RequestOutputKind.FINAL_ONLY:
                yield number, processor.report()
            if finished:
                del self._untaken[number]

    def _salvage(self) -> Iterator[tuple[int, RequestOutput]]:
        """After an interrupt: the rows that ended, as far as `results` was not asked to go on.

        An interrupt strikes anywhere between the engine's last token and the caller's list, in
        our code or in a progress bar's; what was finished by then is not lost.
        """
        self.close()
        yield from self._failed
        for number, processor in self._untaken.items():
            output = processor.reread()
            if output is not None:
                yield number, output

    def _submit_chunk(self, chunk: list[Row]) -> None:
        encoded = self._encode([prompt for prompt, _, _ in chunk])
        streaming = self._output_kind != RequestOutputKind.FINAL_ONLY
        requests: list[Request] = []
        for row, (_, params, priority) in zip(encoded, chunk, strict=True):
            number = self._num_rows
            self._num_rows += 1
            try:
                made = self._factory.make(row, params, priority=priority, streaming=streaming)
            except InvalidRequestError as error:
                self._failed.append((number, error_output(f"invalid-{number}", row, error)))
                continue
            processor = OutputProcessor(row, made, params, self._tokenizer, self._output_kind)
            for request in made:
                self._active[request] = (number, processor)
            self._untaken[number] = processor
            self._num_in_flight += 1
            requests += made
        if requests:
            self._thread.submit(requests, self.stream)


def make_rows(
    prompts: Iterable[Any],
    sampling_params: SamplingParams | Iterable[SamplingParams],
    priority: Iterable[int] | None,
) -> Iterator[Row]:
    """Pair prompts with their parameters; anything may be lazy.

    Raises:
        InvalidRequestError: the lengths are known and differ.
    """
    if isinstance(sampling_params, SamplingParams):
        params: Iterable[SamplingParams] = repeat(sampling_params)
    else:
        params = sampling_params
        _check_length(prompts, params, "sampling_params")
    if priority is not None:
        _check_length(prompts, priority, "priority")
    return zip(prompts, params, repeat(0) if priority is None else priority, strict=False)


def _check_length(prompts: Iterable[Any], values: Iterable[Any], parameter: str) -> None:
    if isinstance(prompts, Sequence) and isinstance(values, Sequence):
        if len(prompts) != len(values):
            raise InvalidRequestError(
                f"{parameter} has {len(values)} entries for {len(prompts)} prompts",
                parameter=parameter,
            )


def raise_errors(outputs: Iterator[tuple[int, RequestOutput]]) -> Iterator[RequestOutput]:
    """The outputs alone; the first one with an error raises it."""
    for _, output in outputs:
        if output.error is not None:
            raise output.error
        yield output


def check_outputs(
    outputs: list[RequestOutput], is_single: bool, max_model_len: int | None = None
) -> list[RequestOutput]:
    """Raise the error of a single prompt; warn of what a list of outputs might hide.

    Args:
        outputs: finished.
        is_single: the user gave one prompt, not a list.
        max_model_len: texts that fill it end in the middle of a sentence, most likely.
    """
    errors = [output.error for output in outputs if output.error is not None]
    if errors and is_single:
        raise errors[0]
    fatal = [error for error in errors if not isinstance(error, NbllmError)]
    if errors:
        warnings.warn(
            f"{len(errors)} of {len(outputs)} prompts failed, see RequestOutput.error; "
            f"the first: {(fatal or errors)[0]}",
            stacklevel=3,
        )
    if max_model_len is not None:
        num_cut = count_cut_texts(outputs, max_model_len)
        if num_cut:
            warnings.warn(
                f"{num_cut} text(s) ended by length: prompt and text filled "
                f"max_model_len={max_model_len}; set max_tokens or stop, or raise max_model_len",
                stacklevel=3,
            )
    return outputs


def token_counts(output: RequestOutput) -> dict[str, int]:
    """What a progress bar counts."""
    return {
        "failed": int(output.error is not None),
        "prompt_tokens": len(output.prompt_token_ids),
        "tokens": sum(len(completion.token_ids) for completion in output.outputs),
    }
