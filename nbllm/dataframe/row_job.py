"""RowJob: the rows of one call, from the frame to the engine and back, whatever is done to them.

    prompt -> token ids -> key -> known? (a twin in this job, the journal) -> engine -> RowResult

Rows go to the engine a window at a time, sorted by their text, so that what begins alike is
computed together, wherever it stands in the frame; results stand at the rows' own places.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

from nbllm.dataframe.journal import Journal, RowResult
from nbllm.errors import Interrupted, InvalidRequestError, RequestFailedError
from nbllm.inputs import EncodedPrompt
from nbllm.llm import LLM
from nbllm.progress import ProgressBar
from nbllm.request_source import requests_from

_WINDOW = 8_192  # rows whose prompts are in memory at once
_CHUNK = 256  # rows that are tokenized at once

Row = tuple[int, Any]
"""A position in the frame, and its prompt."""
Part = tuple[EncodedPrompt, Any]
"""A prompt of the engine, and its parameters."""


class Verb(ABC):
    """What is done to each row.

    Attributes:
        llm: does it.
    """

    llm: LLM

    def render(self, prompt: Any) -> Any:
        """A row's prompt as the engine's tokenizer takes it, or an error in its place."""
        return prompt

    @abstractmethod
    def parts(self, row: int, prompt: EncodedPrompt) -> list[Part]:
        """What the engine is asked for the row at a position: at least one request."""

    @abstractmethod
    def identity(self, row: int) -> dict[str, Any] | None:
        """All that decides the result beside weights and tokens, as JSON; None if chance does."""

    @abstractmethod
    def open(self, rows: Iterator[tuple[Any, Any, int]]) -> Any:
        """The `EngineCall` for (prompt, params, priority) rows."""

    @abstractmethod
    def result(self, outputs: list[Any], row: int) -> RowResult | Exception:
        """What is kept of the engine's outputs, one for each part and none with an error; or why
        they are nothing."""


class RowJob:
    """The rows of one call, by position.

    Args:
        verb: what is done.
        prompts: one per row, None where a value is missing.
        rows: positions of those that are wanted; None is all.
        missing: which rows have a value missing: they are not answered.
        dedupe: rows with the same key are computed once; "auto": where chance has no part.
        in_order: rows go to the engine as they stand.
        max_errors: so many rows may fail, or below 1.0 such a share of `rows`; None: all.
        journal: where results are kept and found, or None.
        model_identity: stands for weights and tokenizer, with a journal.

    Attributes:
        results: what each row came to, or None.
        errors: why a row came to nothing, by position.
        rows: those that are answered: wanted, and not missing.
        is_interrupted: `mark_unfinished` was called.
        num_missing: wanted rows whose values are missing.
        settled: rows that have ended, well or not, in that order.
        num_known: rows that came from the journal.
        num_twins: rows that came from another row of this job.
        totals: what the engine's calls have counted, see `EngineCall.token_counts`.
        first_token_s: seconds to the first token, of each request that had one.
    """

    def __init__(
        self,
        verb: Verb,
        prompts: Sequence[Any],
        *,
        rows: Sequence[int] | None = None,
        missing: Sequence[bool] = (),
        dedupe: bool | str = "auto",
        in_order: bool = False,
        max_errors: int | float | None = None,
        journal: Journal | None = None,
        model_identity: str = "",
    ) -> None:
        self._verb = verb
        self._prompts = prompts
        wanted = range(len(prompts)) if rows is None else rows
        self.rows = [row for row in wanted if not (missing and missing[row])]
        self.num_missing = len(wanted) - len(self.rows)
        self.results: list[RowResult | None] = [None] * len(prompts)
        self.errors: dict[int, BaseException] = {}
        self.is_interrupted = False
        self.num_known = self.num_twins = 0
        self.settled: list[int] = []
        self.totals: dict[str, int] = {}
        self.first_token_s = array("d")
        self._dedupe = dedupe
        self._in_order = in_order
        self._max_errors: int | float = len(self.rows) if max_errors is None else max_errors
        if isinstance(max_errors, float):
            self._max_errors = max_errors * len(self.rows)
        self._journal = journal
        self._model_identity = model_identity
        self._submitted: list[tuple[int, int]] = []  # row and part, in the engine's order
        self._outputs: dict[int, list[Any]] = {}  # of the parts of a row, of which some are not in
        self._keys: dict[int, bytes] = {}  # of rows in flight
        self._twins: dict[int, list[int]] = {}  # rows that wait for a row in flight
        self._first: dict[bytes, int] = {}  # the row that is computed for a key
        self._bar: ProgressBar | None = None

    def run(self, bar: ProgressBar) -> None:
        """Fill `results` and `errors`; on an interrupt as far as rows had ended.

        Raises:
            JournalError: results can't be kept any more.
            RequestFailedError: more than `max_errors` rows have failed.
        """
        self._bar = bar
        with self._open() as call, self._kept(call):
            call.run(self._keep, _TokenBar(bar, self.totals))

    async def arun(self, bar: ProgressBar) -> None:
        """`run` for any event loop; cancelling the task leaves what had ended."""
        self._bar, tokens = bar, _TokenBar(bar, self.totals)
        with self._open() as call, self._kept(call):
            async with aclosing(call.aresults()) as results:
                async for number, output in results:
                    self._keep(number, output)
                    tokens.update(1, **call.token_counts(output))

    def first_ended(self, count: int) -> list[int]:
        """At most `count` rows that have ended, those that failed before the others."""
        failed = list(self.errors)[:count]
        others = (row for row in self.settled[: 2 * count] if row not in self.errors)
        return failed + list(islice(others, count - len(failed)))

    def mark_unfinished(self) -> None:
        """What an interrupt leaves behind."""
        self.is_interrupted = True
        for row in self.rows:
            if self.results[row] is None and row not in self.errors:
                self.errors[row] = Interrupted()

    def _open(self) -> Any:
        """The call that the engine's share of the rows goes through."""
        with requests_from("dataframe"):
            return self._verb.open(self._engine_rows())

    def _kept(self, call: Any) -> AbstractContextManager[None]:
        """While it is open, the journal keeps what rows in flight have so far."""
        if self._journal is None:
            return nullcontext()
        return self._journal.following(lambda: self._begun(call))

    def _begun(self, call: Any) -> dict[bytes, list[array[int]]]:
        """Token ids of each text of the rows in flight, by key; from any thread."""
        begun = {}
        for number, texts in call.begun().items():
            row, _ = self._submitted[number]
            key = self._keys.get(row)
            if key is not None and len(self._outputs.get(row, ())) == 1 and any(texts):
                begun[key] = texts
        return begun

    def _engine_rows(self) -> Iterator[tuple[Any, Any, int]]:
        """What the engine has to compute; the other rows are settled on the way."""
        for row, prompt in self.encoded():
            if prompt.error is not None:
                self._settle([row], prompt.error)
            elif self._needs_engine(row, prompt):
                if self._journal is not None:
                    prompt = replace(prompt, begun=self._journal.begun(self._keys[row]))
                parts = self._verb.parts(row, prompt)
                self._outputs[row] = [None] * len(parts)
                for number, (part, params) in enumerate(parts):
                    self._submitted.append((row, number))
                    yield part, params, 0

    def stream(self, bar: ProgressBar) -> Generator[None, None, None]:
        """`run`, in steps: gives way whenever rows have ended. Closing it stops the others."""
        self._bar, tokens = bar, _TokenBar(bar, self.totals)
        with self._open() as call, self._kept(call):
            for number, output in call.results():
                self._keep(number, output)
                tokens.update(1, **call.token_counts(output))
                yield

    def encoded(self) -> Iterator[tuple[int, EncodedPrompt]]:
        """The rows as the engine gets them, in its order; what is wrong with one is its error."""
        for start in range(0, len(self.rows), _WINDOW):
            rows = self.rows[start : start + _WINDOW]
            prompts = ((row, self._prompts[row]) for row in rows)
            window = [(row, prompt) for row, prompt in prompts if prompt is not None]
            if not self._in_order:
                window.sort(key=lambda item: item[1] if isinstance(item[1], str) else "")
            for first in range(0, len(window), _CHUNK):
                yield from self._encode(window[first : first + _CHUNK])

    def _encode(self, chunk: list[Row]) -> Iterator[tuple[int, EncodedPrompt]]:
        rendered = [self._render(prompt) for _, prompt in chunk]
        encoded = self._verb.llm._encode(rendered)
        for (row, _), prompt in zip(chunk, encoded, strict=True):
            yield row, prompt

    def _render(self, prompt: Any) -> Any:
        if not isinstance(prompt, InvalidRequestError):
            try:
                return self._verb.render(prompt)
            except InvalidRequestError as error:
                prompt = error
        return EncodedPrompt(None, [], prompt)

    def _needs_engine(self, row: int, prompt: EncodedPrompt) -> bool:
        """False if the row is settled, or will be with its twin."""
        if self._dedupe is False and self._journal is None:
            return True
        identity = self._verb.identity(row)
        is_chance = identity is None
        if is_chance and (self._journal is None and self._dedupe == "auto"):
            return True
        # A row that chance decides is itself alone: it is found again, and no other row is it.
        own = {"row": row} if identity is None else identity
        key = row_key(self._model_identity, prompt.token_ids, own)
        if self._journal is not None:
            known = self._journal.get(key)
            if known is not None:
                self.num_known += 1
                self._settle([row], known)
                return False
            self._keys[row] = key
        if self._dedupe is False or (is_chance and self._dedupe == "auto"):
            return True
        first = self._first.setdefault(key, row)
        if first == row:
            return True
        self.num_twins += 1
        self._keys.pop(row, None)
        result = self.results[first]
        if result is not None:
            self._settle([row], result)
        elif first in self.errors:
            self._settle([row], self.errors[first])
        else:
            self._twins.setdefault(first, []).append(row)
        return False

    def _keep(self, number: int, output: Any) -> None:
        row, part = self._submitted[number]
        outputs = self._outputs.get(row)
        if outputs is None:  # another part has failed; or the interrupted call says it once more
            return
        outputs[part] = output
        if output.metrics.first_token_time:
            self.first_token_s.append(output.metrics.first_token_latency)
        if output.error is not None:
            self._finish(row, output.error)
        elif all(outputs):
            self._finish(row, self._verb.result(outputs, row))

    def _finish(self, row: int, end: RowResult | Exception) -> None:
        """A row that went through the engine has ended, and its twins with it."""
        del self._outputs[row]
        key = self._keys.pop(row, None)
        if isinstance(end, RowResult) and key is not None and self._journal is not None:
            self._journal.append(key, end)
        self._settle([row, *self._twins.pop(row, ())], end)

    def _settle(self, rows: Sequence[int], end: RowResult | BaseException) -> None:
        """Some rows have come to the same end."""
        for row in rows:
            if isinstance(end, RowResult):
                self.results[row] = end
            else:
                self.errors[row] = end
            self.settled.append(row)
            if self._bar is not None:
                self._bar.update(1, failed=int(not isinstance(end, RowResult)))
        if len(self.errors) > self._max_errors:
            first = next(iter(self.errors.values()))
            raise RequestFailedError(
                f"{len(self.errors)} of {len(self.rows)} rows failed, more than max_errors allows; "
                f"the first: {first}",
                parameter="max_errors",
            ) from first


class _TokenBar:
    """Counts what the engine reports, but not its rows: a row of the frame may have many."""

    def __init__(self, bar: ProgressBar, totals: dict[str, int]) -> None:
        self._bar = bar
        self._totals = totals

    def update(self, count: int, **stats: int) -> None:
        stats.pop("failed", None)
        for name, value in stats.items():
            self._totals[name] = self._totals.get(name, 0) + value
        self._bar.update(0, **stats)

    def expect(self, count: int) -> None:
        self._bar.expect(count)

    def close(self) -> None:
        self._bar.close()


def row_key(model_identity: str, token_ids: Sequence[int], identity: dict[str, Any]) -> bytes:
    """SHA-256 of all that decides a row's result."""
    head = json.dumps([model_identity, identity], sort_keys=True, default=str)
    digest = hashlib.sha256(head.encode())
    try:
        digest.update(array("I", token_ids).tobytes())
    except OverflowError:  # no ids of any vocabulary: the engine will say so
        digest.update(repr(list(token_ids)).encode())
    return digest.digest()
