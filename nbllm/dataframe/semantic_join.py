"""Join: the pairs of rows for which the answer to a question is yes.

    df.llm.join(products, "Is the review '{review}' about a {name}?", threshold=0.8)
    df.llm.join(products, "...", candidates=5, left_on="review", right_on="name")

Without candidates every pair is asked about; with them only those of the most similar texts are.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nbllm.checks import check_float, check_int
from nbllm.dataframe.call_options import CallOptions, check_choice
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.frame_verbs import FrameVerbs, read_options
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.label_call import score_call
from nbllm.dataframe.pairs import Suffixes, all_pairs, merged, similar_pairs
from nbllm.dataframe.passes import Steps
from nbllm.dataframe.sources import FrameSource
from nbllm.dataframe.vector_call import VectorCall, VectorOptions
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM
from nbllm.pooling_params import PoolingParams

_MAX_PAIRS = 1_000_000


class JoinVerbs(FrameVerbs):
    """`df.llm.join`."""

    def join(self, other: pd.DataFrame, template: Any, *, job: bool = False, **options: Any) -> Any:
        """Join the rows of two frames for which the answer to a question is yes.

        Args:
            other: another frame.
            template: a question with columns of both frames, as in `score`; those that both have
                are named with their suffixes.

        Keyword args:
            threshold: pairs with p(yes) above it are joined, from 0 to 1, default 0.5.
            candidates: ask only about so many rows of `other` for each row: those whose texts are
                most similar, as in `sim_join`. None (the default) asks about every pair.
            left_on, right_on: these texts, as in `sim_join`.
            pooling: of their vectors.
            max_pairs: more pairs are an error, default 1,000,000.
            how: "inner" has the pairs only, "left" also the rows that have no partner.
            suffixes: of columns that both frames have, as in `pandas.merge`.
            out: name of the column with p(yes), default "score".
            errors: what becomes of a pair whose question fails, and which is not joined: "warn"
                (the default) or "raise".
            job: True returns at once with the `FrameJob` that `submit` returns.
            instruction, calibrate, chat, system, template_format, llm, na, dedupe, order, journal,
                use_tqdm: as in `score`.

        Returns:
            a new frame as `pandas.merge` makes it, the rows in the order of this frame.

        Raises:
            InvalidRequestError: an argument is wrong, or there are too many pairs.
            Interrupted: Ctrl-C; `.partial` has the pairs, with p(yes) where it is known.
            JournalError: the journal can't be used.
        """
        return self._join(other, template, **options).answer(job)

    async def ajoin(self, other: pd.DataFrame, template: Any, **options: Any) -> pd.DataFrame:
        """`join` for any event loop; cancelling the task stops it."""
        joined: pd.DataFrame = await self._join(other, template, **options).submit()
        return joined

    def _join(
        self,
        other: pd.DataFrame,
        template: Any,
        *,
        threshold: float = 0.5,
        candidates: int | None = None,
        left_on: Any = None,
        right_on: Any = None,
        pooling: str | None = None,
        max_pairs: int = _MAX_PAIRS,
        how: str = "inner",
        suffixes: Suffixes = ("_x", "_y"),
        out: Hashable = "score",
        llm: LLM | None = None,
        **options: Any,
    ) -> JoinCall:
        if not isinstance(other, pd.DataFrame):
            raise InvalidRequestError(
                f"other must be a DataFrame, got {type(other).__name__}", parameter="other"
            )
        check_choice("how", how, ("inner", "left"))
        check_choice("errors", options.setdefault("errors", "warn"), ("warn", "raise"))
        check_choice("on_interrupt", options.get("on_interrupt", "raise"), ("raise",))
        least = check_float("threshold", threshold, minimum=0.0, maximum=1.0)
        frame, llm = self._frame, llm or default_llm()
        of_rows = {name: v for name, v in options.items() if name in CallOptions.__slots__}
        checked = read_options(of_rows, label="Joining")
        description = JobDescription("join", None, frame, len(frame), llm)
        per_row = len(other)
        nearest: VectorCall | None = None
        if candidates is not None:
            k = check_int("candidates", candidates, minimum=1)
            per_row = min(k, per_row)
            if left_on is None:
                raise InvalidRequestError(
                    "candidates are found by the texts of left_on (and right_on)",
                    parameter="left_on",
                )
            right_on = left_on if right_on is None else right_on
            read = VectorOptions({"params": PoolingParams(pooling=pooling)}, "f-string", checked)
            sides = [
                read.vectors(side, source, llm, description)
                for side, source in ((frame, left_on), (other, right_on))
            ]
            device = llm.config.device
            nearest = VectorCall(
                checked, sides, lambda vectors: similar_pairs(vectors, device, k, -1.0)
            )
        num_pairs = len(frame) * per_row
        if num_pairs > max_pairs:
            raise InvalidRequestError(
                f"{num_pairs:,} pairs are more than max_pairs={max_pairs:,}: find the likely ones "
                "with candidates=",
                parameter="max_pairs",
            )
        score = dict(options, out=out, llm=llm)
        return JoinCall(
            checked, frame, other, template, least, nearest, how, suffixes, score, description
        )


@dataclass(slots=True)
class JoinCall(FrameCall):
    """One call of `join`.

    Attributes:
        options: of the call.
        left, right: frames.
        template: a question.
        threshold: p(yes) above it joins a pair.
        candidates: makes the pairs; None is all.
        how, suffixes: as in `merged`.
        score: arguments of the verb `score`.
        description: what is written beside a journal.
    """

    options: CallOptions
    left: pd.DataFrame
    right: pd.DataFrame
    template: Any
    threshold: float
    candidates: VectorCall | None
    how: str
    suffixes: Suffixes
    score: dict[str, Any]
    description: JobDescription

    def steps(self) -> Steps:
        """See `FrameCall.steps`: find the pairs, ask, and join."""
        if self.candidates is None:
            pairs = all_pairs(len(self.left), len(self.right))
        else:
            pairs = yield from self.candidates.steps()
        scores = score_call(FrameSource(self._asked(pairs), self.template), None, **self.score)
        scores.rows.description = self.description
        return self._joined(pairs, (yield from scores.steps()))

    def _asked(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """The pairs' columns, for the question."""
        name = self.score["out"]
        unknown = pairs.assign(similarity=0.0)
        frame = merged(self.left, self.right, unknown, name, suffixes=self.suffixes)
        return frame.drop(columns=[name])

    def _joined(self, pairs: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
        name = self.score["out"]
        p = scored[name].to_numpy(dtype=float, na_value=float("nan"))
        chosen = pairs.assign(similarity=p)[p > self.threshold]
        options: dict[str, Any] = {"how": self.how, "suffixes": self.suffixes}
        return merged(self.left, self.right, chosen, name, **options)
