"""lint: what a call would do, before it is made.

df.llm.lint("Translate to French: {text}", SamplingParams(max_tokens=100))
"""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.llm import LLM
from nbllm.progress import progress_bar
from nbllm.sampling_params import SamplingParams

_NUM_NAMES = 6
_NUM_BARS = 24
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class LintReport:
    """What `df.llm.lint` found; its repr is a text to read.

    Attributes:
        num_rows: of the frame.
        num_missing: rows with a missing value: not answered.
        missing: missing values by column, of those that the template names and that have some.
        unused: columns that the template does not name, if it is text with fields.
        num_empty: prompts without a letter but blanks.
        num_failed: prompts that can't be made; `errors` counts why.
        num_duplicates: rows that are the same tokens as an earlier one.
        prompt_tokens: [answered rows] int64, exact.
        num_too_long: prompts that leave no room for a token.
        num_cut: rows whose `max_tokens` the context cuts short.
        shared_tokens: of all prompt tokens, those that stand at the beginning of the row computed
            before, too: found in the prefix cache, if that is on.
        max_rows_at_once: rows of the mean length that the KV cache holds at a time.
        seconds: how long the call takes, from a probe; None without one.
        samples: the first prompts, as the model sees them.
        errors: why prompts failed, and how often.
    """

    num_rows: int
    num_missing: int
    missing: dict[Hashable, int] = field(default_factory=dict)
    unused: Sequence[Hashable] = ()
    num_empty: int = 0
    num_failed: int = 0
    num_duplicates: int = 0
    prompt_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    num_too_long: int = 0
    num_cut: int = 0
    shared_tokens: int = 0
    max_rows_at_once: int = 0
    seconds: float | None = None
    samples: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _lines(self) -> list[str]:
        tokens = self.prompt_tokens
        lines = [f"{self.num_rows:,} rows, {len(tokens):,} to answer"]
        for count, what in (
            (self.num_missing, "with missing values, skipped"),
            (self.num_failed, "whose prompt can't be made"),
            (self.num_empty, "with an empty prompt"),
            (self.num_too_long, "whose prompt does not fit into the context: these fail"),
            (self.num_cut, "whose answer the context may cut short"),
            (self.num_duplicates, "that repeat an earlier one (computed once, if chance is out)"),
        ):
            if count:
                lines.append(f"  {count:,} {what}")
        lines += [f"  {count:,}x {text}" for text, count in self.errors.most_common(3)]
        if self.missing:
            counts = [f"{name} {count:,}" for name, count in self.missing.items()]
            lines.append(f"missing values: {_first(counts)}")
        if self.unused:
            lines.append(f"columns that are not in the template: {_first(self.unused)}")
        if len(tokens):
            low, p50, p90, p99, high = np.percentile(tokens, [0, 50, 90, 99, 100]).astype(int)
            lines.append(
                f"prompt tokens: {int(tokens.sum()):,}; a row p50 {p50:,}, p90 {p90:,}, "
                f"p99 {p99:,}, max {high:,}"
            )
            if low < high:
                lines.append(f"  {low:,} |{_histogram(tokens)}| {high:,}")
            share = self.shared_tokens / max(int(tokens.sum()), 1)
            lines.append(f"shared with the row before, in the engine's order: {share:.0%}")
            lines.append(f"the KV cache holds about {self.max_rows_at_once:,} such rows at once")
        if self.seconds is not None:
            lines.append(f"estimated time: {self.seconds:,.1f} s")
        lines += [f"--- sample {number}\n{text}" for number, text in enumerate(self.samples, 1)]
        return lines


def lint(
    call: RowCall,
    params: list[SamplingParams],
    *,
    unused: Sequence[Hashable],
    probe: int,
    samples: int,
) -> LintReport:
    """Tokenize all rows of a call, and answer some.

    Args:
        call: not run.
        params: one per row.
        unused: columns that the template does not name.
        probe: rows that are answered to estimate the time; 0 estimates none.
        samples: prompts to show.
    """
    llm = call.verb.llm
    rows = _rows(call)
    missing = {name: count for name, count in call.prompts.num_missing().items() if count}
    report = LintReport(len(call.prompts), rows.num_missing, missing, unused)
    lengths: list[int] = []
    seen: set[bytes] = set()
    before = np.zeros(0, dtype=np.uint32)
    assert llm.config.max_model_len is not None
    for row, prompt in rows.encoded():
        if prompt.error is not None:
            report.num_failed += 1
            report.errors[str(prompt.error)] += 1
            continue
        ids = np.array(prompt.token_ids, dtype=np.uint32)
        lengths.append(len(ids))
        report.num_empty += not (prompt.text is None or prompt.text.strip())
        room = llm.config.max_model_len - len(ids)
        report.num_too_long += room < 1
        most = params[row].max_tokens
        report.num_cut += 1 <= room < (0 if most is None else most)
        known = ids.tobytes()
        report.num_duplicates += known in seen
        seen.add(known)
        report.shared_tokens += _common_length(before, ids)
        before = ids
        if len(report.samples) < samples:
            report.samples.append(prompt.text or repr(prompt.token_ids))
    report.prompt_tokens = np.array(lengths, dtype=np.int64)
    if lengths:
        report.max_rows_at_once = _rows_at_once(llm, float(np.mean(lengths)), params)
    if probe and lengths:
        report.seconds = _probe(call, rows.rows, probe)
    return report


def _rows(call: RowCall, rows: list[int] | None = None) -> RowJob:
    wanted = call.wanted if rows is None else rows
    return RowJob(
        call.verb, call.prompts, rows=wanted, missing=call.prompts.missing(), dedupe=False
    )


def _first(names: Sequence[Hashable]) -> str:
    """The first of some names, and how many follow."""
    rest = len(names) - _NUM_NAMES
    shown = ", ".join(map(str, names[:_NUM_NAMES]))
    return shown if rest <= 0 else f"{shown} and {rest:,} more"


def _histogram(values: np.ndarray) -> str:
    """Bars for ranges of one width, from the smallest value to the largest; none is a blank."""
    counts, _ = np.histogram(values, bins=_NUM_BARS)
    heights = -(-counts * (len(_BARS) - 1) // counts.max())  # rounded up: whatever counts is seen
    return "".join(_BARS[height] for height in heights)


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size


def _rows_at_once(llm: LLM, mean_length: float, params: list[SamplingParams]) -> int:
    most = [p.max_tokens for p in params if p.max_tokens is not None]
    mean_length += float(np.mean(most)) if most else 0.0
    block_size = llm.config.block_size
    assert block_size is not None and llm.config.max_num_seqs is not None
    assert llm.config.num_gpu_blocks_override is not None  # resolved when the engine was made
    blocks = max(1, -(-int(mean_length) // block_size))
    return min(llm.config.num_gpu_blocks_override // blocks, llm.config.max_num_seqs)


def _probe(call: RowCall, rows: list[int], count: int) -> float:
    """Seconds for all rows, from those that a few take, evenly chosen; the first ones warm up."""
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    num_first = len(chosen) // 4
    for part in (chosen[:num_first], chosen[num_first:]):
        job = _rows(call, part)
        started = time.perf_counter()
        with closing(progress_bar(len(part), "Probing", enabled=False)) as bar:
            job.run(bar)
        seconds = time.perf_counter() - started
    return seconds / max(len(chosen) - num_first, 1) * len(rows)
