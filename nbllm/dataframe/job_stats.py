"""JobStats: how far a call has come, and how fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbllm.dataframe.passes import Passes


@dataclass(frozen=True, slots=True)
class JobStats:
    """Counts of one call, as of one moment.

    Attributes:
        num_rows: rows that are answered when it is done, as far as it is known: those of all
            times that a call goes over rows.
        num_done: rows that have ended, well or not.
        num_failed: rows that came to nothing.
        num_known: rows that came from the journal.
        num_twins: rows that came from another row of the call.
        num_prompt_tokens: of the prompts that the engine is done with; 0 for embeddings.
        num_cached_tokens: those of them that were in the prefix cache.
        num_tokens: generated; for embeddings those of the texts.
        seconds: since the call began, or how long it took.
        first_token_p50_s, first_token_p99_s: seconds from when the engine got a prompt to its first
            token; None before there was one.
    """

    num_rows: int
    num_done: int
    num_failed: int
    num_known: int
    num_twins: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    seconds: float
    first_token_p50_s: float | None
    first_token_p99_s: float | None

    @classmethod
    def of(cls, passes: Passes, seconds: float) -> JobStats:
        """Those of a call that has run for `seconds`; its last pass may go on meanwhile."""
        jobs = passes.counted
        latencies = np.concatenate([[], *(np.array(rows.first_token_s[:]) for rows in jobs)])
        p50, p99 = np.percentile(latencies, (50, 99)).tolist() if len(latencies) else (None, None)
        return cls(
            num_rows=passes.num_rows,
            num_done=passes.num_done,
            num_failed=sum(len(rows.errors) for rows in jobs),
            num_known=sum(rows.num_known for rows in jobs),
            num_twins=sum(rows.num_twins for rows in jobs),
            num_prompt_tokens=sum(rows.totals.get("prompt_tokens", 0) for rows in jobs),
            num_cached_tokens=sum(rows.totals.get("cached_tokens", 0) for rows in jobs),
            num_tokens=sum(rows.totals.get("tokens", 0) for rows in jobs),
            seconds=seconds,
            first_token_p50_s=p50,
            first_token_p99_s=p99,
        )

    @property
    def rows_per_s(self) -> float:
        """Rows that ended per second."""
        return self.num_done / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """`num_tokens` per second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until it is done, if rows go on ending at this rate; None before the first and at the
        end."""
        if not 0 < self.num_done < self.num_rows:
            return None
        return self.seconds / self.num_done * (self.num_rows - self.num_done)

    @property
    def prefix_hit_share(self) -> float | None:
        """Share of the prompts' tokens that were in the prefix cache; None without prompts."""
        if not self.num_prompt_tokens:
            return None
        return self.num_cached_tokens / self.num_prompt_tokens

    def __str__(self) -> str:
        parts = [
            f"{self.num_done:,} of {self.num_rows:,} rows",
            f"{self.rows_per_s:,.1f} rows/s",
            f"{self.tokens_per_s:,.0f} tokens/s",
        ]
        for count, what in (
            (self.num_failed, "failed"),
            (self.num_known, "known"),
            (self.num_twins, "twins"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        if self.prefix_hit_share is not None:
            parts.append(f"{self.prefix_hit_share:.0%} prefix hits")
        if self.first_token_p50_s is not None and self.first_token_p99_s is not None:
            p50, p99 = 1e3 * self.first_token_p50_s, 1e3 * self.first_token_p99_s
            parts.append(f"first token p50 {p50:,.0f} ms, p99 {p99:,.0f} ms")
        return ", ".join([*parts, f"{self.seconds:,.1f} s"])
