"""SummaryRounds: from the texts of each group to one summary, in rounds over all groups."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from nbllm.dataframe.call_options import CallOptions
from nbllm.dataframe.citations import claims
from nbllm.dataframe.columns import text_array
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.generate_verb import Generate
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.packing import Packing, Piece
from nbllm.dataframe.passes import Steps
from nbllm.dataframe.prompts import Prompts
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.errors import Interrupted, InvalidRequestError

Ends = tuple[dict[int, list[Piece]], dict[int, list[Piece]], dict[int, BaseException]]
"""By group: the texts of those that are not done, the summaries, and why there is none."""


@dataclass(slots=True)
class SummaryRounds(FrameCall):
    """The texts of each group, and how far they have come.

    Attributes:
        packing: makes prompts of them.
        verb_of: (number of texts of each prompt) -> what answers these.
        cells: position and text of each group's rows; an error, or None for a missing text, may be
            among them.
        options: checked.
        frame: of the result, a row for each group.
        out: name of its new column.
        labels: of the rows, by position; None: summaries are not of claims.
        make_result: (frame with the new columns) -> what is returned.
        description: what is written beside a journal.
    """

    packing: Packing
    verb_of: Callable[[Sequence[int]], Generate]
    cells: list[list[tuple[int, Any]]]
    options: CallOptions
    frame: pd.DataFrame
    out: Hashable
    labels: pd.Index[Any] | None
    make_result: Callable[[pd.DataFrame], Any]
    description: JobDescription
    _texts: dict[int, list[Piece]] = field(default_factory=dict, init=False)  # of those not done
    _summaries: dict[int, list[Piece]] = field(default_factory=dict, init=False)
    _errors: dict[int, BaseException] = field(default_factory=dict, init=False)
    _num_prompts: dict[int, int] = field(default_factory=dict, init=False)  # of the last round

    def __post_init__(self) -> None:
        for place, cells in enumerate(self.cells):
            wrong = next((c for _, c in cells if not (c is None or isinstance(c, str))), None)
            if isinstance(wrong, Exception):
                self._fail(place, wrong)
            elif wrong is not None:
                kind = type(wrong).__name__
                self._fail(place, InvalidRequestError(f"only texts are summarized, not a {kind}"))
            elif texts := [Piece(cell, (row,)) for row, cell in cells if cell is not None]:
                self._texts[place] = texts

    def steps(self) -> Steps:
        """See `FrameCall.steps`: a pass is a round."""
        description: JobDescription | None = self.description
        while self._texts:
            places, packs = self._next_round()
            prompts = [self.packing.prompt(pack) for pack in packs]
            rows = Prompts({"": prompts}, len(prompts), lambda values: values[""])

            def make_frame(
                job: RowJob,
                places: list[int] = places,
                packs: list[list[Piece]] = packs,
            ) -> Any:
                return self._result(*self._ends(places, packs, job))

            verb = self.verb_of([len(pack) for pack in packs])
            job = yield RowCall(verb, rows, self.options, make_frame, None, description)
            self._texts, self._summaries, self._errors = self._ends(places, packs, job)
            description = None  # the journal of the first round has it
        return self._result(self._texts, self._summaries, self._errors)

    def _next_round(self) -> tuple[list[int], list[list[Piece]]]:
        """The group of each prompt of a round, and its texts."""
        packs: list[list[Piece]] = []
        places: list[int] = []
        for place, texts in list(self._texts.items()):
            try:
                packed = self.packing.packs(texts)
                if len(packed) >= self._num_prompts.get(place, len(packed) + 1):
                    raise InvalidRequestError("no two summaries fit a prompt: lower max_tokens")
            except InvalidRequestError as error:
                self._fail(place, error)
                continue
            self._num_prompts[place] = len(packed)
            packs += packed
            places += [place] * len(packed)
        return places, packs

    def _ends(self, places: list[int], packs: list[list[Piece]], rows: RowJob) -> Ends:
        """How far the groups are when the rows of a round have come so far."""
        texts, summaries, errors = dict(self._texts), dict(self._summaries), dict(self._errors)
        answers: dict[int, list[list[Piece]]] = {place: [] for place in places}
        for place, pack, result in zip(places, packs, rows.results, strict=True):
            if result is not None:
                text = result.texts[0]
                answers[place].append([Piece(text)] if self.labels is None else claims(text, pack))
        for row, error in rows.errors.items():
            errors.setdefault(places[row], error)
        num_prompts = Counter(places)
        for place, said in answers.items():
            if place in errors:
                del texts[place]
            elif len(said) == num_prompts[place]:
                texts[place] = [piece for answer in said for piece in answer]
                if len(said) == 1:
                    summaries[place] = texts.pop(place)
        if rows.is_interrupted:
            errors |= {place: Interrupted() for place in texts}
        return texts, summaries, errors

    def _result(
        self,
        texts: dict[int, list[Piece]],
        summaries: dict[int, list[Piece]],
        errors: dict[int, BaseException],
    ) -> Any:
        places = range(len(self.frame))
        said = {place: " ".join(p.text for p in pieces) for place, pieces in summaries.items()}
        result = self.frame.copy()
        result[self.out] = text_array([said.get(place) for place in places], result.index)
        if self.labels is not None:
            cited = [self._citations(summaries.get(place)) for place in places]
            result[f"{self.out}_citations"] = pd.Series(cited, index=result.index, dtype=object)
        if self.options.errors == "column":
            shown = [str(errors[p]) if p in errors else None for p in places]
            result[f"{self.out}_error"] = text_array(shown, result.index)
        return self.make_result(result)

    def _citations(self, summary: list[Piece] | None) -> list[dict[str, Any]] | None:
        if summary is None or self.labels is None:
            return None
        labels = self.labels
        return [{"claim": text, "rows": labels.take(list(rows)).tolist()} for text, rows in summary]

    def _fail(self, place: int, error: Exception) -> None:
        self._texts.pop(place, None)
        self._errors[place] = error
        if self.options.errors == "raise":
            raise error
        if self.options.errors == "warn":
            warnings.warn(f"a group could not be summarized: {error}", stacklevel=2)
