"""Citations: the claims of a summary, each with the rows that it stands on.

The texts of a prompt are numbered, and the model is held to JSON that names such numbers only. So
each claim's rows are rows that the model was shown, whatever it says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import pandas as pd

from nbllm.dataframe.generate_verb import Generate, cut_error
from nbllm.dataframe.journal import RowResult
from nbllm.dataframe.packing import Piece
from nbllm.errors import InvalidRequestError, RequestFailedError
from nbllm.outputs import RequestOutput
from nbllm.sampling_params import SamplingParams, StructuredOutputsParams

MAX_TOKENS = 256  # of a summary with citations, unless the call says otherwise
_MOST_CLAIMS = 3
_MOST_ROWS = 5  # of a claim, in one prompt


class Cite(Generate):
    """Claims as JSON, in `RowResult.texts`."""

    def result(self, outputs: list[RequestOutput], row: int) -> RowResult | Exception:
        completion = outputs[0].outputs[0]
        if completion.finish_reason != "stop":
            return cut_error(completion)
        try:
            json.loads(completion.text)
        except ValueError as error:  # by a stop string, say
            return RequestFailedError(f"the claims are no JSON: {error}")
        return super().result(outputs, row)


def citing(params: SamplingParams) -> Callable[[int], SamplingParams]:
    """From the number of texts in a prompt to how it is sampled.

    Prompts with as many texts share a schema, and the engine its compiled grammar.
    """

    @cache
    def params_of(num_texts: int) -> SamplingParams:
        assert params.max_tokens is not None
        form = StructuredOutputsParams(
            json=_schema(num_texts, params.max_tokens), disable_any_whitespace=True
        )
        return params.clone(structured_outputs=form)

    return params_of


def claims(answer: str, pack: Sequence[Piece]) -> list[Piece]:
    """The claims of an answer to a prompt, each with the rows of the texts that it cites.

    Args:
        answer: JSON, as a `Cite` keeps it.
        pack: the texts of the prompt.
    """
    pieces = []
    for item in json.loads(answer)["claims"]:
        rows = [row for number in item["rows"] for row in pack[number - 1].rows]
        pieces.append(Piece(item["claim"], tuple(dict.fromkeys(rows))))
    return pieces


def citation_table(frame: pd.DataFrame, out: Hashable = "summary") -> pd.DataFrame:
    """A row for each claim and each row that it cites.

    A group without a summary has one row, where both are missing, as `DataFrame.explode` does.

    Args:
        frame: of `summarize(..., cite=True)`; it is not changed.
        out: as it was there.

    Returns:
        a frame with the keys of the groups, `claim`, `row` (the label of the cited row: it can be
        merged with the index of the frame that was summarized) and `<out>_error`, if there is one.

    Raises:
        InvalidRequestError: there are no citations, or a key is named "claim" or "row".
    """
    if f"{out}_citations" not in frame.columns:
        raise InvalidRequestError(f"there is no column '{out}_citations'", parameter="out")
    has_keys = not isinstance(frame.index, pd.RangeIndex) or frame.index.name is not None
    keyed = frame.reset_index() if has_keys else frame
    keys = keyed.drop(columns=[out, f"{out}_citations"])
    for name in ("claim", "row"):
        if name in keys.columns:
            raise InvalidRequestError(f"a key of the groups is named {name!r}", parameter="cite")
    errors = [name for name in keys.columns if name == f"{out}_error"]
    places, said, rows = [], [], []
    for place, cited in enumerate(keyed[f"{out}_citations"]):
        for claim in cited or [{"claim": None, "rows": [None]}]:
            for row in claim["rows"]:
                places.append(place)
                said.append(claim["claim"])
                rows.append(row)
    table = keys.drop(columns=errors).iloc[places].reset_index(drop=True)
    table["claim"] = pd.array(said, dtype="string")
    table["row"] = pd.Series([*rows, None], dtype=object).iloc[:-1].infer_objects()
    for name in errors:
        table[name] = keys[name].iloc[places].to_numpy()
    return table


def _schema(num_texts: int, max_tokens: int) -> dict[str, Any]:
    """Short enough for `max_tokens` where a token is two characters or more on average."""
    claim = {
        "type": "object",
        "properties": {
            "claim": {"type": "string", "minLength": 1, "maxLength": max(max_tokens // 3, 1)},
            "rows": {
                "type": "array",
                "items": {"enum": list(range(1, num_texts + 1))},
                "minItems": 1,
                "maxItems": min(num_texts, _MOST_ROWS),
            },
        },
        "required": ["claim", "rows"],
        "additionalProperties": False,
    }
    several = {"type": "array", "items": claim, "minItems": 1, "maxItems": _MOST_CLAIMS}
    return {
        "type": "object",
        "properties": {"claims": several},
        "required": ["claims"],
        "additionalProperties": False,
    }
