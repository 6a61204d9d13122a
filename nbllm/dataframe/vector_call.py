"""VectorCall: columns of vectors, as they are or embedded, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.call_options import CallOptions
from nbllm.dataframe.embed import Embed, pop_pooling, vector_column
from nbllm.dataframe.frame_call import FrameCall
from nbllm.dataframe.frame_verbs import read_options
from nbllm.dataframe.jobs import JobDescription
from nbllm.dataframe.passes import Steps
from nbllm.dataframe.prompts import frame_prompts, is_missing
from nbllm.dataframe.row_call import RowCall
from nbllm.dataframe.row_job import RowJob
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM


@dataclass(slots=True)
class VectorCall(FrameCall):
    """Columns of vectors, and what is made of them.

    Attributes:
        options: of the call.
        columns: a call that makes a Series of vectors, or vectors, each.
        finish: vectors of each column -> what is returned.
    """

    options: CallOptions
    columns: list[RowCall | list[Any]]
    finish: Callable[[list[list[Any]]], pd.DataFrame]

    def steps(self) -> Steps:
        """See `FrameCall.steps`."""
        vectors = []
        for column in self.columns:
            if isinstance(column, RowCall):
                column = (yield from column.steps()).tolist()
            vectors.append(column)
        return self.finish(vectors)


@dataclass(slots=True)
class VectorOptions:
    """How columns become vectors.

    Attributes:
        pooled: arguments of `Embed`.
        template_format: of templates.
        checked: how rows are treated.
    """

    pooled: dict[str, Any]
    template_format: str
    checked: CallOptions

    @classmethod
    def read(cls, options: dict[str, Any]) -> VectorOptions:
        """Of the arguments of `embed`.

        Raises:
            InvalidRequestError: one of them is wrong.
        """
        options = dict(options)
        pooled = pop_pooling(options)
        template_format = options.pop("template_format", "f-string")
        checked = read_options(options, errors="warn", label="Embedding")
        if checked.errors == "column" or checked.on_interrupt == "return":
            parameter = "errors" if checked.errors == "column" else "on_interrupt"
            raise InvalidRequestError(
                f"{parameter}={getattr(checked, parameter)!r} has no meaning here: the rows of the "
                "result are not those of the frame",
                parameter=parameter,
            )
        return cls(pooled, template_format, checked)

    def vectors(
        self, frame: pd.DataFrame, source: Any, llm: LLM, description: JobDescription
    ) -> RowCall | list[Any]:
        """The vectors of a frame's rows, or the call that makes a Series of them.

        Args:
            frame: not changed.
            source: a column or template; or a column that holds vectors.
            llm: embeds.
            description: of the call, for the journal.

        Raises:
            InvalidRequestError: there is no such column.
        """
        prompts = frame_prompts(
            frame, source, template_format=self.template_format, na=self.checked.na
        )
        if isinstance(source, Hashable) and source in frame.columns:
            cells = frame[source].tolist()
            filled = [cell for cell in cells if not is_missing(cell)]
            if filled and all(map(is_vector, filled)):
                return cells

        def make_frame(rows: RowJob) -> pd.Series[Any]:
            return vector_column(rows.results, frame.index)

        verb = Embed(llm, **self.pooled)
        return RowCall(verb, prompts, self.checked, make_frame, None, description)


def is_vector(cell: Any) -> bool:
    """True for an array, or a list, of floats; token ids are none."""
    if isinstance(cell, np.ndarray):
        return cell.ndim == 1 and bool(np.issubdtype(cell.dtype, np.floating))
    return isinstance(cell, list) and bool(cell) and all(type(item) is float for item in cell)
