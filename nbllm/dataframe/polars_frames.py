"""`.llm` of polars' DataFrame and LazyFrame.

    pl.read_csv("faq.csv").llm.generate("question", out="answer")
    pl.scan_csv("faq.csv").llm.generate("question", out="answer").collect()

The frames go to the verbs as Arrow tables. Nothing but polars is imported before a verb is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Give polars' frames their `.llm`. Idempotent."""
    import polars as pl

    for owner, verbs, name in (
        (pl.DataFrame, PolarsVerbs, "register_dataframe_namespace"),
        (pl.LazyFrame, LazyVerbs, "register_lazyframe_namespace"),
    ):
        if not hasattr(owner, "llm"):
            getattr(pl.api, name)("llm")(verbs)


class PolarsVerbs:
    """The verbs of `df.llm` that return frames, and their asynchronous twins: see pandas' `.llm`.

    They return new polars frames. The columns that were there keep their types; texts are String,
    numbers Float64 or Int64, vectors Array(Float32), several texts a row List(String). Frames and
    Series among the arguments are polars' too.
    """

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __getattr__(self, name: str) -> Any:
        from nbllm.dataframe import arrow_frames

        if name in arrow_frames.verbs():
            return _method(name, functools.partial(self._run, name))
        if name.removeprefix("a") in arrow_frames.verbs():
            return _method(name, functools.partial(self._arun, name[1:]))
        raise AttributeError(
            f"polars' .llm has no {name!r}; it has {', '.join(arrow_frames.verbs())}"
        )

    def __dir__(self) -> list[str]:
        from nbllm.dataframe import arrow_frames

        return [name for verb in arrow_frames.verbs() for name in (verb, "a" + verb)]

    def _run(self, verb: str, *arguments: Any, **options: Any) -> Any:
        from nbllm.dataframe.arrow_frames import map_table
        from nbllm.errors import Interrupted

        try:
            table = map_table(_as_arrow(self._frame), verb, *_each(arguments), **_all(options))
        except Interrupted as error:
            raise Interrupted(partial=self._as_polars(error.partial)) from None
        return self._as_polars(table)

    async def _arun(self, verb: str, *arguments: Any, **options: Any) -> Any:
        from nbllm.dataframe.arrow_frames import amap_table

        table = await amap_table(_as_arrow(self._frame), verb, *_each(arguments), **_all(options))
        return self._as_polars(table)

    def _as_polars(self, table: Any) -> Any:
        import polars as pl

        if table is None:
            return None
        frame: Any = pl.from_arrow(table)
        before = self._frame.schema
        kept = [n for n in frame.columns if n in before and frame.schema[n] != before[n]]
        return frame.with_columns(pl.col(name).cast(before[name]) for name in kept)


class LazyVerbs:
    """The verbs of `df.llm` that treat each row alone, and `dedup`, as steps of a plan.

    Their arguments are checked, and the result's schema is known, when the step is added: both
    cost no tokens. What they do waits for `collect`.
    """

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __getattr__(self, name: str) -> Any:
        if name in self._verbs():
            return _method(name, functools.partial(self._plan, name))
        raise AttributeError(
            f"a LazyFrame's .llm has no {name!r}, only {', '.join(self._verbs())}: collect first"
        )

    def __dir__(self) -> list[str]:
        return self._verbs()

    def _verbs(self) -> list[str]:
        from nbllm.dataframe import arrow_frames

        each_alone = (*arrow_frames.ROW_VERBS, "filter", "dedup")
        return [name for name in arrow_frames.verbs() if name in each_alone]

    def _plan(self, verb: str, *arguments: Any, **options: Any) -> Any:
        import polars as pl

        from nbllm.dataframe.arrow_frames import ROW_VERBS
        from nbllm.errors import InvalidRequestError

        empty = pl.DataFrame(schema=self._frame.collect_schema())
        schema = getattr(PolarsVerbs(empty), verb)(*arguments, **options).schema
        for name, dtype in schema.items():
            if dtype == pl.Null and name not in empty.columns:
                raise InvalidRequestError(
                    f"the type of column {name!r} is not known before the rows are: collect first"
                )

        def run(frame: Any) -> Any:
            done = getattr(PolarsVerbs(frame), verb)(*arguments, **options)
            return done.select(pl.col(name).cast(dtype) for name, dtype in schema.items())

        keeps_rows = verb in ROW_VERBS and not options.get("explode")
        return self._frame.map_batches(
            run,
            schema=schema,
            predicate_pushdown=False,  # it may be about a column that is made here
            projection_pushdown=False,  # the template's columns are needed
            slice_pushdown=keeps_rows,
        )


def _method(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """With the name and the docstring of pandas' verb."""
    from nbllm.dataframe.accessor import DataFrameAccessor

    functools.update_wrapper(run, getattr(DataFrameAccessor, name), updated=())
    return run


def _as_arrow(frame: Any) -> Any:
    import polars as pl

    from nbllm.dataframe.journal import import_arrow
    from nbllm.errors import InvalidRequestError

    import_arrow()
    try:
        # Views of strings, which newer polars makes, are not what pandas can read.
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise InvalidRequestError(f"the frame can't become an Arrow table: {error}") from error


def _value(value: Any) -> Any:
    import polars as pl

    if isinstance(value, pl.DataFrame):
        return _as_arrow(value)
    if isinstance(value, pl.LazyFrame):
        return _as_arrow(value.collect())
    if isinstance(value, pl.Series):
        return value.to_arrow()
    return _all(value) if isinstance(value, dict) else value


def _each(arguments: tuple[Any, ...]) -> list[Any]:
    return [_value(argument) for argument in arguments]


def _all(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in options.items()}
