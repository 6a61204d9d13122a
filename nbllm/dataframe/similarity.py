"""Verbs on the similarity of texts: the nearest rows of another frame, of a query, of each other.

    df.llm.sim_join(products, "question", "description", k=3)
    df.llm.topk("review", 10, query="it broke on the first day")
    df.llm.dedup("title", min_similarity=0.97)

All are exact: every pair is compared, by float32 matrix products on the LLM's device. A column may
hold the vectors already (that of `embed`, say): then no model is asked.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nbllm.checks import check_float, check_int
from nbllm.dataframe.call_options import CallOptions, check_choice
from nbllm.dataframe.embed import series_embedding
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.frame_verbs import FrameVerbs
from nbllm.dataframe.generate_verb import arguments_as_json
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.label_call import score_call
from nbllm.dataframe.nearest import nearest, similar_groups, unit_rows
from nbllm.dataframe.pairs import Suffixes, merged, similar_pairs
from nbllm.dataframe.passes import Steps
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.sources import FrameSource
from nbllm.dataframe.vector_call import VectorCall, VectorOptions, is_vector
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

_ROUNDING = 1e-6


@dataclass(slots=True)
class LikeliestCall(FrameCall):
    """The rows with the largest scores.

    Attributes:
        options: of the call.
        scores: the call that adds them.
        out: their column.
        k: how many rows.
    """

    options: CallOptions
    scores: FrameCall
    out: Hashable
    k: int

    def steps(self) -> Steps:
        """See `FrameCall.steps`."""
        return _likeliest((yield from self.scores.steps()), self.out, self.k)


class SimilarityVerbs(FrameVerbs):
    """`df.llm.sim_join`, `topk` and `dedup`."""

    def sim_join(
        self,
        other: pd.DataFrame,
        left_on: Any,
        right_on: Any = None,
        *,
        job: bool = False,
        **options: Any,
    ) -> Any:
        """Join each row with the `k` most similar rows of another frame, by cosine similarity.

        Args:
            other: another frame.
            left_on: column or template of this frame, as in `embed`; or a column of vectors.
            right_on: the same of `other`; default: as `left_on`.

        Keyword args:
            k: rows of `other` for each row, default 1.
            min_similarity: pairs that are less similar are left out; default: none is.
            how: "inner" has the pairs only, "left" also the rows that have no partner.
            suffixes: of columns that both frames have, as in `pandas.merge`.
            out: name of the column with the similarities (-1 to 1), default "similarity".
            errors: what becomes of a text that can't be embedded, and so has no partner: "warn"
                (the default) or "raise".
            job: True returns at once with the `FrameJob` that `submit` returns.
            pooling, dimensions, truncate_prompt_tokens, template_format, llm, na, dedupe, order,
                journal, use_tqdm: as in `embed`.

        Returns:
            a new frame as `pandas.merge` makes it, the rows in the order of this frame and the
            best partner first (of partners as similar, the first of `other`).

        Raises:
            InvalidRequestError, JournalError: as `embed`.
            Interrupted: Ctrl-C; `.partial` has the vectors so far of the side that was embedded.
        """
        return self._sim_join(other, left_on, right_on, **options).answer(job)

    async def asim_join(
        self, other: pd.DataFrame, left_on: Any, right_on: Any = None, **options: Any
    ) -> pd.DataFrame:
        """`sim_join` for any event loop; cancelling the task stops it."""
        joined: pd.DataFrame = await self._sim_join(other, left_on, right_on, **options).submit()
        return joined

    def topk(
        self, column_or_template: Any = None, k: int = 10, *, job: bool = False, **options: Any
    ) -> Any:
        """The `k` rows most similar to a query, or likeliest by a question, best first.

        Args:
            column_or_template: as in `embed`; or a column of vectors. Not with a question.
            k: how many; rows that have no vector or answer are never among them.

        Keyword args:
            query: a text; or a vector.
            question: instead: a yes/no question with fields, as in `score`.
            out: name of the column with the similarities (-1 to 1), default "similarity"; or with
                p(yes), default "score".

        The other arguments and errors are those of `sim_join`, or of `score`. The rows keep their
        index.
        """
        return self._topk(column_or_template, k, **options).answer(job)

    async def atopk(
        self, column_or_template: Any = None, k: int = 10, **options: Any
    ) -> pd.DataFrame:
        """`topk` for any event loop; cancelling the task stops it."""
        found: pd.DataFrame = await self._topk(column_or_template, k, **options).submit()
        return found

    def dedup(
        self,
        column_or_template: Any,
        min_similarity: float = 0.95,
        *,
        job: bool = False,
        **options: Any,
    ) -> Any:
        """The first row of each group of near-duplicates, with its index, in the frame's order.

        Args:
            column_or_template: as in `embed`; or a column of vectors.
            min_similarity: two rows that are at least so similar are in one group, and so are
                those that are linked by others.

        Rows without a vector are kept. The keyword arguments and errors are those of `sim_join`,
        as far as they concern the vectors.
        """
        return self._dedup(column_or_template, min_similarity, **options).answer(job)

    async def adedup(
        self, column_or_template: Any, min_similarity: float = 0.95, **options: Any
    ) -> pd.DataFrame:
        """`dedup` for any event loop; cancelling the task stops it."""
        kept: pd.DataFrame = await self._dedup(
            column_or_template, min_similarity, **options
        ).submit()
        return kept

    def _sim_join(
        self,
        other: pd.DataFrame,
        left_on: Any,
        right_on: Any = None,
        *,
        k: int = 1,
        min_similarity: float | None = None,
        how: str = "inner",
        suffixes: Suffixes = ("_x", "_y"),
        out: Hashable = "similarity",
        llm: LLM | None = None,
        **options: Any,
    ) -> VectorCall:
        frame, llm = self._frame, llm or default_llm()
        if not isinstance(other, pd.DataFrame):
            raise InvalidRequestError(
                f"other must be a DataFrame, got {type(other).__name__}", parameter="other"
            )
        check_int("k", k, minimum=1)
        check_choice("how", how, ("inner", "left"))
        least = _check_similarity(-1.0 if min_similarity is None else min_similarity)
        right_on = left_on if right_on is None else right_on
        read = VectorOptions.read(options)
        description = JobDescription("sim_join", None, frame, len(frame), llm)
        sides = [
            read.vectors(side, source, llm, description)
            for side, source in ((frame, left_on), (other, right_on))
        ]
        device = llm.config.device

        def finish(vectors: list[list[Any]]) -> pd.DataFrame:
            pairs = similar_pairs(vectors, device, k, least)
            return merged(frame, other, pairs, out, how=how, suffixes=suffixes)

        return VectorCall(read.checked, sides, finish)

    def _topk(self, column_or_template: Any, k: int, **options: Any) -> FrameCall:
        check_int("k", k, minimum=0)
        question = options.pop("question", None)
        if question is None:
            return self._most_similar(column_or_template, k, **options)
        if column_or_template is not None or options.pop("query", None) is not None:
            raise InvalidRequestError(
                "a question has the columns in itself: leave column_or_template and query out",
                parameter="question",
            )
        out = options.setdefault("out", "score")
        check_choice("errors", options.setdefault("errors", "warn"), ("warn", "raise"))
        scores = score_call(FrameSource(self._frame, question), None, **options)
        return LikeliestCall(scores.options, scores, out, k)

    def _most_similar(
        self,
        column_or_template: Any,
        k: int,
        *,
        query: Any = None,
        out: Hashable = "similarity",
        llm: LLM | None = None,
        **options: Any,
    ) -> VectorCall:
        frame, llm = self._frame, llm or default_llm()
        self._answers(out, [out])
        read = VectorOptions.read(options)
        described = dict(options, column_or_template=column_or_template, k=k, query=query, out=out)
        description = JobDescription("topk", arguments_as_json(described), frame, len(frame), llm)
        rows = read.vectors(frame, column_or_template, llm, description)
        asked: RowCall | list[Any] = [query]
        if isinstance(query, str):
            own = {name: v for name, v in options.items() if name != "template_format"}
            asked = series_embedding(pd.Series([query]), llm=llm, **(own | {"errors": "raise"}))
            asked.description, asked.is_counted = description, False
        elif not is_vector(query):
            raise InvalidRequestError("query must be a text or a vector", parameter="query")
        device = llm.config.device

        def finish(vectors: list[list[Any]]) -> pd.DataFrame:
            texts, positions = unit_rows(vectors[0], device, "column_or_template")
            wanted, _ = unit_rows(vectors[1], device, "query")
            columns, similarity = nearest(wanted, texts, k, "query")
            found = frame.iloc[positions[columns[0]]].copy()
            found[out] = similarity[0]
            return found

        return VectorCall(read.checked, [rows, asked], finish)

    def _dedup(
        self,
        column_or_template: Any,
        min_similarity: float = 0.95,
        *,
        llm: LLM | None = None,
        **options: Any,
    ) -> VectorCall:
        frame, llm = self._frame, llm or default_llm()
        least = _check_similarity(min_similarity)
        read = VectorOptions.read(options)
        described = dict(
            options, column_or_template=column_or_template, min_similarity=min_similarity
        )
        description = JobDescription("dedup", arguments_as_json(described), frame, len(frame), llm)
        rows = read.vectors(frame, column_or_template, llm, description)
        device = llm.config.device

        def finish(vectors: list[list[Any]]) -> pd.DataFrame:
            texts, positions = unit_rows(vectors[0], device, "column_or_template")
            is_kept = np.ones(len(frame), dtype=bool)
            is_kept[positions] = similar_groups(texts, least) == np.arange(len(positions))
            return frame[is_kept].copy()

        return VectorCall(read.checked, [rows], finish)


def _likeliest(scored: pd.DataFrame, out: Hashable, k: int) -> pd.DataFrame:
    """The rows with the largest numbers; of equal ones the first."""
    numbers = scored[out].to_numpy(dtype=float, na_value=np.nan)
    order = np.argsort(-numbers, kind="stable")
    return scored.iloc[order[~np.isnan(numbers[order])][:k]]


def _check_similarity(value: float) -> float:
    """What similarities are compared with: equal texts are not always 1 to the last bit."""
    return check_float("min_similarity", value, minimum=-1.0, maximum=1.0) - _ROUNDING
