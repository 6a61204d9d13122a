"""Summarize: one text for each group of rows, however many there are.

    df.groupby("product").llm.summarize("review", instruction="What do the buyers complain about?")

The texts of a group are packed into prompts that fit the context, each prompt is answered, and the
answers are packed in turn, until one is left. The prompts of all groups are one batch, round by
round.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd
from pandas.api.typing import DataFrameGroupBy

from nbllm.checks import check_int
from nbllm.dataframe.call_options import CallOptions, check_choice
from nbllm.dataframe.columns import text_array
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.frame_verbs import read_options
from nbllm.dataframe.generate_verb import Generate, Params, row_params
from nbllm.dataframe.group_rows import group_rows
from nbllm.dataframe.passes import Steps
from nbllm.dataframe.prompts import FORMATS, Prompts, frame_prompts
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.default_llm import default_llm
from nbllm.errors import Interrupted, InvalidRequestError
from nbllm.llm import LLM
from nbllm.sampling_params import SamplingParams

INSTRUCTION = "Summarize the following texts in one short paragraph."
_BETWEEN = "\n\n"
_LEAST_ROOM = 32  # tokens of texts in a prompt


def register_groupby() -> None:
    """Give the groups of a DataFrame their `.llm`. Idempotent.

    pandas has a way to register accessors for frames only. A property on the public class is what
    that comes to; a column named "llm" of a grouped frame is `grouped["llm"]` then.
    """
    if not isinstance(getattr(DataFrameGroupBy, "llm", None), property):
        setattr(DataFrameGroupBy, "llm", property(GroupByAccessor))  # noqa: B010 (mypy)


class GroupByAccessor:
    """`df.groupby(...).llm`: see `summarize`."""

    def __init__(self, groups: Any) -> None:
        self._groups = groups

    def summarize(self, column_or_template: Any, *, job: bool = False, **options: Any) -> Any:
        """A summary of each group's texts.

        Args:
            column_or_template: as in `generate`: what the text of a row is.

        Keyword args:
            instruction: what is asked of the model; it stands before the texts, and before the
                summaries of parts of a group that was too long for one prompt.
            max_tokens: of a summary, default 128; two of them must fit a prompt.
            sampling_params: as in `generate`, but the same for all.
            out: name of the new column, default "summary".
            na: "skip" leaves rows with missing values out, "fill" makes empty texts of them,
                "raise" refuses them.
            errors: "column" puts why a group has no summary into `<out>_error`; "warn" only warns;
                "raise" raises the first error.
            job: True returns at once with the `FrameJob` that `submit` returns.
            system, chat, template_format, llm, dedupe, order, journal, use_tqdm, on_interrupt: as
                in `generate`.

        Returns:
            a frame with a row for each group, as `agg` makes it: `as_index`, `sort`, `dropna` and
            `observed` of the `groupby` hold. A group without texts has no summary.

        Raises:
            InvalidRequestError: an argument is wrong; `.parameter` names it.
            Interrupted: Ctrl-C; `.partial` has the summaries so far.
            JournalError: the journal can't be used.
        """
        return self._rounds(column_or_template, **options).answer(job)

    async def asummarize(self, column_or_template: Any, **options: Any) -> pd.DataFrame:
        """`summarize` for any event loop; cancelling the task stops it."""
        summaries: pd.DataFrame = await self._rounds(column_or_template, **options).submit()
        return summaries

    def _rounds(
        self,
        column_or_template: Any,
        *,
        instruction: str = INSTRUCTION,
        max_tokens: int = 128,
        sampling_params: Params = None,
        out: Hashable = "summary",
        system: str | None = None,
        chat: bool | str = "auto",
        template_format: str = "f-string",
        llm: LLM | None = None,
        **options: Any,
    ) -> SummaryRounds:
        checked = read_options(options, label="Summarizing")
        check_choice("chat", chat, (True, False, "auto"))
        check_choice("template_format", template_format, FORMATS)
        check_int("max_tokens", max_tokens, minimum=1)
        if isinstance(sampling_params, Sequence):
            raise InvalidRequestError(
                "sampling_params must be the same for all groups", parameter="sampling_params"
            )
        llm = llm or default_llm()
        params = row_params(sampling_params, llm, 1)(0).clone(max_tokens=max_tokens, n=1)
        texts = frame_prompts(
            self._groups.obj, column_or_template, template_format=template_format, na=checked.na
        )
        if checked.na == "raise" and any(texts.missing()):
            raise InvalidRequestError(
                f"{sum(texts.missing())} rows have missing values", parameter="na"
            )
        frame, groups = group_rows(self._groups, [out, f"{out}_error"])
        verb = Generate(
            llm,
            lambda row: params,
            chat=chat,
            system=system,
            keeps_tokens=checked.journal is not None,
        )
        packing = Packing(verb, params, instruction)
        cells = [[texts[row] for row in rows] for rows in groups]
        return SummaryRounds(packing, cells, checked, frame, out)


class Packing:
    """From texts to prompts that fit the context.

    Args:
        verb: renders the prompts.
        params: with `max_tokens` of an answer.
        instruction: stands before the texts.

    Raises:
        InvalidRequestError: two answers do not fit a prompt.
    """

    def __init__(self, verb: Generate, params: SamplingParams, instruction: str) -> None:
        self.verb = verb
        self._instruction = instruction
        longest = verb.llm.config.max_model_len
        assert longest is not None and params.max_tokens is not None
        self._limit = longest - params.max_tokens
        around = self._num_tokens([""])
        self._room = self._limit - around
        if self._room < max(2 * (params.max_tokens + 2), _LEAST_ROOM):
            raise InvalidRequestError(
                f"two summaries of {params.max_tokens} tokens and the instruction ({around} "
                f"tokens) do not fit max_model_len={longest}: lower max_tokens",
                parameter="max_tokens",
            )

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """Prompts that hold all of the texts, in their order; a text that is too long is divided.

        Raises:
            InvalidRequestError: a text can't be tokenized.
        """
        packs: list[list[str]] = [[]]
        filled = 0
        for piece, num_tokens in self._pieces(texts):
            if packs[-1] and filled + num_tokens > self._room:
                packs.append([])
                filled = 0
            packs[-1].append(piece)
            filled += num_tokens
        return [self._prompt(fitting) for pack in packs for fitting in self._fit(pack)]

    def _pieces(self, texts: Sequence[str]) -> list[tuple[str, int]]:
        """Texts that fit a prompt, and the tokens of each with what is between it and the next."""
        pieces = []
        between = self._count(_BETWEEN)
        for encoded in self.verb.llm._encode(list(texts)):
            if encoded.error is not None:
                raise encoded.error
            text, num_tokens = encoded.text or "", len(encoded.token_ids) + between
            if num_tokens <= self._room:
                pieces.append((text, num_tokens))
            else:
                pieces += self._pieces(halves(text))
        return pieces

    def _fit(self, pack: list[str]) -> list[list[str]]:
        """The pack, divided where the exact count of its prompt says so."""
        if self._num_tokens(pack) <= self._limit:
            return [pack]
        middle = len(pack) // 2
        parts = [pack[:middle], pack[middle:]] if middle else [[half] for half in halves(pack[0])]
        return [fitting for part in parts for fitting in self._fit(part)]

    def _prompt(self, pack: Sequence[str]) -> str:
        return _BETWEEN.join([self._instruction, *pack])

    def _num_tokens(self, pack: Sequence[str]) -> int:
        return self._count(self.verb.render(self._prompt(pack)))

    def _count(self, prompt: Any) -> int:
        encoded = self.verb.llm._encode([prompt])[0]
        if encoded.error is not None:
            raise encoded.error
        return len(encoded.token_ids)


def halves(text: str) -> list[str]:
    """A text in two, between words if there are any near the middle."""
    middle = len(text) // 2
    start = text.rfind(" ", middle // 2, middle)
    cut = start if start > 0 else max(middle, 1)
    return [text[:cut], text[cut:]]


Ends = tuple[dict[int, list[str]], dict[int, str], dict[int, BaseException]]
"""By group: the texts of those that are not done, the summaries, and why there is none."""


class SummaryRounds(FrameCall):
    """The texts of each group, and how far they have come.

    Args:
        packing: makes prompts of them.
        groups: the texts of each group; an error, or None for a missing one, may be among them.
        options: checked.
        frame: of the result, a row for each group.
        out: name of its new column.
    """

    def __init__(
        self,
        packing: Packing,
        groups: list[list[Any]],
        options: CallOptions,
        frame: pd.DataFrame,
        out: Hashable,
    ) -> None:
        self._packing = packing
        self.options = options
        self._frame = frame
        self._out = out
        self._texts: dict[int, list[str]] = {}  # of groups that are not done
        self._summaries: dict[int, str] = {}
        self._errors: dict[int, BaseException] = {}
        self._num_rounds = 0
        for place, cells in enumerate(groups):
            texts = [cell for cell in cells if cell is not None]
            wrong = next((text for text in texts if not isinstance(text, str)), None)
            if isinstance(wrong, Exception):
                self._fail(place, wrong)
            elif wrong is not None:
                kind = type(wrong).__name__
                self._fail(place, InvalidRequestError(f"only texts are summarized, not a {kind}"))
            elif texts:
                self._texts[place] = texts

    def steps(self) -> Steps:
        """See `FrameCall.steps`: a pass is a round."""
        while self._texts:
            places, prompts = self._next_round()
            rows = Prompts({"": prompts}, len(prompts), lambda values: values[""])

            def make_frame(job: RowJob, places: list[int] = places) -> pd.DataFrame:
                return self._frame_of(*self._ends(places, job))

            job = yield RowCall(self._packing.verb, rows, self.options, make_frame)
            self._texts, self._summaries, self._errors = self._ends(places, job)
        return self._frame_of(self._texts, self._summaries, self._errors)

    def _next_round(self) -> tuple[list[int], list[str]]:
        """The group of each prompt of a round, and the prompts."""
        self._num_rounds += 1
        prompts: list[str] = []
        all_places: list[int] = []
        for place, texts in list(self._texts.items()):
            try:
                packed = self._packing.prompts(texts)
                if self._num_rounds > 1 and len(packed) >= len(texts):
                    raise InvalidRequestError("no two summaries fit a prompt: lower max_tokens")
            except InvalidRequestError as error:
                self._fail(place, error)
                continue
            prompts += packed
            all_places += [place] * len(packed)
        return all_places, prompts

    def _ends(self, places: list[int], rows: RowJob) -> Ends:
        """How far the groups are when the rows of a round have come so far."""
        texts, summaries, errors = dict(self._texts), dict(self._summaries), dict(self._errors)
        answers: dict[int, list[str]] = {}
        for place, result in zip(places, rows.results, strict=True):
            answers.setdefault(place, []).extend(result.texts if result is not None else ())
        for row, error in rows.errors.items():
            errors.setdefault(places[row], error)
        num_prompts = Counter(places)
        for place, said in answers.items():
            if place in errors:
                del texts[place]
            elif len(said) == num_prompts[place]:
                texts[place] = said
                if len(said) == 1:
                    summaries[place] = texts.pop(place)[0]
        if rows.is_interrupted:
            errors |= {place: Interrupted() for place in texts}
        return texts, summaries, errors

    def _frame_of(
        self,
        texts: dict[int, list[str]],
        summaries: dict[int, str],
        errors: dict[int, BaseException],
    ) -> pd.DataFrame:
        places = range(len(self._frame))
        result = self._frame.copy()
        result[self._out] = text_array([summaries.get(p) for p in places], result.index)
        if self.options.errors == "column":
            shown = [str(errors[p]) if p in errors else None for p in places]
            result[f"{self._out}_error"] = text_array(shown, result.index)
        return result

    def _fail(self, place: int, error: Exception) -> None:
        self._texts.pop(place, None)
        self._errors[place] = error
        if self.options.errors == "raise":
            raise error
        if self.options.errors == "warn":
            warnings.warn(f"a group could not be summarized: {error}", stacklevel=2)
