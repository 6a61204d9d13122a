"""EngineCall: the rows of one call on their way through the engine, whoever waits for them.

`LLM.generate`, `stream`, `embed`, their asynchronous twins, the DataFrame accessor and the server
are all loops around one of these; they differ in how they wait. Rows are taken from the caller's
iterable only as fast as the engine needs them, so a call over a million rows holds a few thousand.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from nbllm.engine.request_stream import Progress, RequestStream
from nbllm.errors import InvalidRequestError, NbllmError
from nbllm.inputs import EncodedPrompt
from nbllm.interruptible import woken_often
from nbllm.progress import ProgressBar, progress_bar
from nbllm.request_source import request_source

if TYPE_CHECKING:
    from nbllm.engine.engine_thread import EngineThread
    from nbllm.engine.request import Request

_CHUNK = 256  # rows tokenized at once


class RowOutput(Protocol):
    """What is reported of a row."""

    error: Exception | None


ParamsT = TypeVar("ParamsT")
OutputT = TypeVar("OutputT", bound=RowOutput)
OutputT_co = TypeVar("OutputT_co", bound=RowOutput, covariant=True)


class Processor(Protocol[OutputT_co]):
    """Follows the requests of one row."""

    @property
    def is_finished(self) -> bool:
        """True once all its requests were read to their end."""

    def update(self, request: Request, num_output_tokens: int) -> bool:
        """Read a request up to so many generated tokens; True if it ended there."""

    def report(self) -> OutputT_co:
        """What is known now."""

    def reread(self) -> OutputT_co | None:
        """The final report, made from the requests alone; None if not all came to their end."""


class EngineCall(ABC, Generic[ParamsT, OutputT]):
    """Rows in, `(row number, output)` out.

    Use as a context manager: leaving it aborts what still runs.

    Args:
        rows: a prompt as the user wrote it, its parameters and its priority each; taken lazily.
        encode: many prompts -> `EncodedPrompt`s.
        thread: runs them.
        max_in_flight: rows submitted and not yet finished.
        reports_changes: False yields each row once; True each change of a row.
    """

    def __init__(
        self,
        rows: Iterable[tuple[object, ParamsT, int]],
        *,
        encode: Callable[[list[object]], list[EncodedPrompt]],
        thread: EngineThread,
        max_in_flight: int,
        reports_changes: bool = False,
    ) -> None:
        self.stream = RequestStream()
        self._rows = iter(rows)
        self._encode = encode
        self._thread = thread
        self._max_in_flight = max_in_flight
        self._reports_changes = reports_changes
        self._source = request_source.get()
        self._active: dict[Request, tuple[int, Processor[OutputT]]] = {}
        self._untaken: dict[int, Processor[OutputT]] = {}  # rows whose end nobody has taken yet
        self._num_rows = 0
        self._num_in_flight = 0
        self._exhausted = False
        self._failed: list[tuple[int, OutputT]] = []

    def __enter__(self) -> EngineCall[ParamsT, OutputT]:
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

    def fill(self, outputs: list[OutputT | None], label: str, use_tqdm: Any) -> None:
        """`run` into a list with a place for each row, show the progress, and close.

        Args:
            outputs: filled, on an interrupt as far as rows had ended.
            label: what is being done.
            use_tqdm: as in `LLM.generate`; a single row has no progress to show.
        """
        shown = use_tqdm if len(outputs) > 1 else False
        with closing(progress_bar(len(outputs), label, enabled=shown, unit="prompt")) as bar, self:
            self.run(outputs.__setitem__, bar)

    def run(self, keep: Callable[[int, OutputT], None], bar: ProgressBar) -> None:
        """Run all rows and hand each output to `keep`; on an interrupt some of them once more."""
        try:
            for number, output in self.results():
                keep(number, output)
                bar.update(1, **self.token_counts(output))
        except KeyboardInterrupt:
            for number, output in self._salvage():
                keep(number, output)
            raise

    def results(self) -> Iterator[tuple[int, OutputT]]:
        """Run all rows; yields what `submit` and `absorb` do."""
        yield from self.submit()
        while self.is_waiting:
            yield from self.absorb(self.stream.take())
            yield from self.submit()

    async def aresults(self) -> AsyncGenerator[tuple[int, OutputT], None]:
        """`results` for any event loop."""
        with woken_often():
            for item in self.submit():
                yield item
            while self.is_waiting:
                for item in self.absorb(await self.stream.take_async()):
                    yield item
                for item in self.submit():
                    yield item

    def submit(self) -> Iterator[tuple[int, OutputT]]:
        """Keep the engine supplied; yields the rows that failed before they reached it."""
        while not self._exhausted and self._num_in_flight <= self._max_in_flight - _CHUNK // 2:
            chunk = list(islice(self._rows, min(_CHUNK, self._max_in_flight)))
            if not chunk:
                self._exhausted = True
                break
            self._submit_chunk(chunk)
            yield from self._failed
            self._failed.clear()

    def absorb(self, progress: list[Progress]) -> Iterator[tuple[int, OutputT]]:
        """Turn what `stream` delivered into outputs."""
        changed: dict[int, Processor[OutputT]] = {}
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
            if finished or self._reports_changes:
                yield number, processor.report()
            if finished:
                del self._untaken[number]

    def begun(self) -> dict[int, list[array[int]]]:
        """What rows in flight have generated so far, see `GenerationCall`; here nothing is."""
        return {}

    @abstractmethod
    def token_counts(self, output: OutputT) -> dict[str, int]:
        """What a progress bar counts."""

    @abstractmethod
    def _begin(
        self, row: EncodedPrompt, params: ParamsT, priority: int
    ) -> tuple[list[Request], Processor[OutputT]]:
        """The requests of a row, and who follows them.

        Raises:
            InvalidRequestError: the row can't be run.
        """

    @abstractmethod
    def _error_output(self, request_id: str, row: EncodedPrompt, error: Exception) -> OutputT:
        """The report of a row that could not be run at all."""

    def _salvage(self) -> Iterator[tuple[int, OutputT]]:
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

    def _submit_chunk(self, chunk: list[tuple[object, ParamsT, int]]) -> None:
        encoded = self._encode([prompt for prompt, _, _ in chunk])
        requests: list[Request] = []
        for row, (_, params, priority) in zip(encoded, chunk, strict=True):
            number = self._num_rows
            self._num_rows += 1
            try:
                made, processor = self._begin(row, params, priority)
            except InvalidRequestError as error:
                failed = self._error_output(f"invalid-{number}", row, error)
                self._failed.append((number, failed))
                continue
            for request in made:
                request.source = self._source
                self._active[request] = (number, processor)
            self._untaken[number] = processor
            self._num_in_flight += 1
            requests += made
        if requests:
            self._thread.submit(requests, self.stream)


def make_rows(
    prompts: Iterable[Any],
    params: ParamsT | Iterable[ParamsT],
    priority: Iterable[int] | None,
    parameter: str = "sampling_params",
) -> Iterator[tuple[object, ParamsT, int]]:
    """Pair prompts with their parameters; anything may be lazy.

    Args:
        prompts: one per row.
        params: one for all rows, or one each.
        priority: one per row; None is 0.
        parameter: what the user calls `params`.

    Raises:
        InvalidRequestError: the lengths are known and differ.
    """
    if isinstance(params, Iterable):
        _check_length(prompts, params, parameter)
    else:
        params = repeat(params)
    if priority is not None:
        _check_length(prompts, priority, "priority")
    each = cast("Iterable[ParamsT]", params)
    return zip(prompts, each, repeat(0) if priority is None else priority, strict=False)


def _check_length(prompts: Iterable[Any], values: Iterable[Any], parameter: str) -> None:
    if isinstance(prompts, Sequence) and isinstance(values, Sequence):
        if len(prompts) != len(values):
            raise InvalidRequestError(
                f"{parameter} has {len(values)} entries for {len(prompts)} prompts",
                parameter=parameter,
            )


def raise_errors(outputs: Iterator[tuple[int, OutputT]]) -> Iterator[OutputT]:
    """The outputs alone; the first one with an error raises it."""
    for _, output in outputs:
        if output.error is not None:
            raise output.error
        yield output


def check_errors(outputs: Sequence[RowOutput], is_single: bool, stacklevel: int = 3) -> None:
    """Raise the error of a single prompt; warn of those that a list of outputs might hide.

    Args:
        outputs: finished.
        is_single: the user gave one prompt, not a list.
        stacklevel: of the user's line, seen from here.
    """
    errors = [output.error for output in outputs if output.error is not None]
    if errors and is_single:
        raise errors[0]
    fatal = [error for error in errors if not isinstance(error, NbllmError)]
    if errors:
        warnings.warn(
            f"{len(errors)} of {len(outputs)} prompts failed, see "
            f"{type(outputs[0]).__name__}.error; "
            f"the first: {(fatal or errors)[0]}",
            stacklevel=stacklevel,
        )
