"""The verbs on Arrow tables, and through them on other frames.

    nbllm.map_table(table, "generate", "question", out="answer")

pandas sees the table's own columns, with Arrow's types; of what comes back, only which rows there
are and the new columns are used. So what the table had is as it was, to the last type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nbllm.dataframe.accessor import DataFrameAccessor
from nbllm.dataframe.journal import import_arrow, logprobs_type
from nbllm.dataframe.prompts import is_missing
from nbllm.default_llm import default_llm
from nbllm.errors import Interrupted, InvalidRequestError

ROW_VERBS = ("generate", "chat", "retry", "extract", "classify", "score", "embed")
"""Verbs whose result has the frame's rows."""
CHOOSING_VERBS = ("filter", "topk", "dedup")
"""Verbs whose result has some of them."""
JOINING_VERBS = ("sim_join", "join")
"""Verbs whose result has pairs of rows."""

_LEFT, _RIGHT = "__nbllm_left__", "__nbllm_right__"  # positions of a pair


def map_table(table: Any, verb: str, *arguments: Any, **options: Any) -> Any:
    """A verb of `df.llm` on a pyarrow table.

    Args:
        table: a `pyarrow.Table` or `RecordBatch`; not changed.
        verb: "generate", "extract", "embed", "sim_join", ...
        arguments, options: of the verb; a frame among them is a table, too, and a Series an array.

    Returns:
        a `pyarrow.Table` with the columns of `table`, their types kept, and the new ones. Vectors
        are fixed-size lists of float32, several texts a row are lists.

    Raises:
        InvalidRequestError: there is no such verb, or as the verb.
        Interrupted: as the verb; `.partial` is a table.
        JournalError: as the verb; or pyarrow is missing.
    """
    call = _TableCall(table, verb, arguments, options)
    try:
        return call.finish(call.run(verb))
    except Interrupted as error:
        raise Interrupted(partial=call.finish(error.partial)) from None


async def amap_table(table: Any, verb: str, *arguments: Any, **options: Any) -> Any:
    """`map_table` for any event loop; cancelling the task stops the rows."""
    call = _TableCall(table, verb, arguments, options)
    return call.finish(await call.run("a" + verb))


def verbs() -> tuple[str, ...]:
    """The verbs that `map_table` knows."""
    names = (*ROW_VERBS, *CHOOSING_VERBS, *JOINING_VERBS)
    return tuple(name for name in names if hasattr(DataFrameAccessor, name))


class _TableCall:
    """A verb's arguments as pandas has them, and the way back."""

    def __init__(
        self, table: Any, verb: str, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        self._arrow = import_arrow()
        if verb not in verbs():
            raise InvalidRequestError(
                f"verb must be one of {', '.join(verbs())}, got {verb!r}", parameter="verb"
            )
        if options.get("job"):
            raise InvalidRequestError("job= is for pandas frames", parameter="job")
        self._table = _as_table(self._arrow, table, "table")
        self._frame = self._as_pandas(self._table)
        self._other: Any = None
        self._arguments = list(arguments)
        self._options: dict[str, Any] = {k: self._as_value(v) for k, v in options.items()}
        self._options["llm"] = self._options.get("llm") or default_llm()
        if verb in JOINING_VERBS:
            self._take_other()
        self._arguments = [self._as_value(value) for value in self._arguments]
        self._types = _known_types(self._arrow, verb, self._arguments, self._options)

    def run(self, method: str) -> Any:
        accessor = DataFrameAccessor(self._frame)
        return getattr(accessor, method)(*self._arguments, **self._options)

    def finish(self, result: pd.DataFrame | None) -> Any:
        """The verb's frame as a table."""
        if result is None:
            return None
        if self._other is None:
            rows = self._table.take(result.index.to_numpy(dtype=np.int64))
        else:
            rows = self._pairs(result)
            result = result.drop(columns=[_LEFT, _RIGHT])
        for number, name in enumerate(result.columns):
            is_old = number < rows.num_columns
            if is_old and isinstance(result.dtypes.iloc[number], pd.ArrowDtype):
                continue
            column = self._column(result.iloc[:, number], str(name))
            if is_old:  # `overwrite`
                rows = rows.set_column(number, str(name), column)
            else:
                rows = rows.append_column(str(name), column)
        return rows

    def _take_other(self) -> None:
        """The other side of a join; both sides get a column that says where a row comes from."""
        other = self._arguments.pop(0) if self._arguments else self._options.pop("other", None)
        self._other = _as_table(self._arrow, other, "other")
        frame = self._as_pandas(self._other)
        frame[_RIGHT] = pd.array(range(len(frame)), dtype="Int64")
        self._frame[_LEFT] = range(len(self._frame))
        self._arguments.insert(0, frame)

    def _pairs(self, result: pd.DataFrame) -> Any:
        arrow = self._arrow
        left = self._table.take(result[_LEFT].to_numpy(dtype=np.int64))
        right = self._other.take(arrow.array(result[_RIGHT], type=arrow.int64(), from_pandas=True))
        names = [str(name) for name in result.columns if name not in (_LEFT, _RIGHT)]
        fields = [*left.schema, *right.schema]
        schema = arrow.schema(
            [field.with_name(name) for field, name in zip(fields, names, strict=False)]
        )
        return arrow.table([*left.columns, *right.columns], schema=schema)

    def _as_pandas(self, table: Any) -> pd.DataFrame:
        frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
        return frame

    def _as_value(self, value: Any) -> Any:
        """Tables and arrays among a verb's arguments."""
        arrow = self._arrow
        if isinstance(value, (arrow.Table, arrow.RecordBatch)):
            return self._as_pandas(_as_table(arrow, value, "table"))
        if isinstance(value, (arrow.Array, arrow.ChunkedArray)):
            return pd.Series(value.to_pylist(), dtype=object)
        if isinstance(value, dict):
            return {name: self._as_value(item) for name, item in value.items()}
        return value

    def _column(self, column: pd.Series[Any], name: str) -> Any:
        arrow = self._arrow
        known = self._types.get(name)
        if known is None and column.dtype != object:
            text = arrow.large_string() if isinstance(column.dtype, pd.StringDtype) else None
            return arrow.Array.from_pandas(column, type=text)
        cells = [None if is_missing(cell) else cell for cell in column.tolist()]
        if known is not None and arrow.types.is_fixed_size_list(known):
            return _vectors(arrow, cells, known)
        if known is not None and arrow.types.is_list(known):
            depth = 2 if arrow.types.is_list(known.value_type) else 1
            cells = [c if c is None or _depth(c) >= depth else [c] for c in cells]
        try:
            return arrow.array(cells, type=known)
        except arrow.ArrowException as error:
            raise InvalidRequestError(
                f"column {name!r} has no one Arrow type ({error}): use a pandas frame",
                parameter="table",
            ) from error


def _as_table(arrow: Any, table: Any, parameter: str) -> Any:
    if isinstance(table, arrow.RecordBatch):
        return arrow.Table.from_batches([table])
    if not isinstance(table, arrow.Table):
        raise InvalidRequestError(
            f"{parameter} must be a pyarrow.Table, got {type(table).__name__}", parameter=parameter
        )
    return table


def _depth(cell: Any) -> int:
    """How many lists are in each other."""
    return 1 + max(map(_depth, cell), default=0) if isinstance(cell, list) else 0


def _vectors(arrow: Any, cells: list[Any], known: Any) -> Any:
    size = known.list_size
    flat = np.zeros((len(cells), size), dtype=np.float32)
    for row, cell in enumerate(cells):
        if cell is not None:
            flat[row] = cell
    missing = arrow.array([cell is None for cell in cells], type=arrow.bool_())
    return arrow.FixedSizeListArray.from_arrays(flat.ravel(), size, mask=missing)


def _known_types(
    arrow: Any, verb: str, arguments: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Arrow types of new columns whose cells don't always show them."""
    if verb == "embed":
        size = options["llm"].model_config.hidden_size
        size = min(options.get("dimensions") or size, size)
        return {str(options.get("out", "embedding")): arrow.list_(arrow.float32(), size)}
    if verb not in ("generate", "chat", "retry", "extract"):
        return {}
    out = str(options.get("out", "extract" if verb == "extract" else "llm"))
    text, number, tokens = arrow.string(), arrow.float64(), logprobs_type(arrow)
    if verb == "extract":
        return {f"{out}_logprobs": tokens}
    if options.get("reply") == "messages":
        message = arrow.struct({"role": text, "content": text})
        return {out: arrow.list_(message), f"{out}_logprobs": tokens}
    params = arguments[1] if len(arguments) > 1 else options.get("sampling_params")
    if not _has_lists(params, options["llm"]):
        return {f"{out}_logprobs": tokens}
    if options.get("explode"):
        return {out: text, f"{out}_logprobs": tokens}
    types = {f"{out}_{name}": arrow.list_(number) for name in ("conf", "ppl", "margin")}
    types[f"{out}_finish"] = arrow.list_(text)
    types[f"{out}_logprobs"] = arrow.list_(tokens)
    types[out] = arrow.list_(text)
    return types


def _has_lists(params: Any, llm: Any) -> bool:
    """True if some row has several texts."""
    if params is None:
        return bool(llm.get_default_sampling_params().n > 1)
    if isinstance(params, Mapping):
        n = params.get("n", 1)
        return any(value > 1 for value in (n if isinstance(n, pd.Series) else [n]))
    return any(item.n > 1 for item in (params if isinstance(params, Sequence) else [params]))
