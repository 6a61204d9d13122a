"""The verbs of `df.llm` on Dask's frames.

    import dask.dataframe as dd, nbllm

    faq = dd.read_parquet("faq/")
    nbllm.dask.generate(faq, "question", out="answer").to_parquet("answers/")

With Dask's threads, the partitions that are computed at the same time are in one continuous batch.
With worker processes, pass `llm` as a dict: each process makes one engine.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from nbllm.dataframe.accessor import DataFrameAccessor
from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

_engines: dict[str, LLM] = {}  # of this process, by their arguments
_engines_lock = threading.Lock()


def _verb(verb: str) -> Callable[..., Any]:
    def run(
        frame: Any, *arguments: Any, llm: LLM | Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        _import_dask()
        if options.get("journal") is not None:
            raise InvalidRequestError(
                "partitions can't share a journal: write the frame in parts", parameter="journal"
            )
        step = Step(verb, arguments, options, default_llm() if llm is None else llm)
        return frame.map_partitions(step, meta=step.describe(frame._meta))

    run.__name__ = run.__qualname__ = verb
    run.__doc__ = f"""`df.llm.{verb}` for a Dask frame.

    Args:
        frame: a `dask.dataframe.DataFrame`.
        arguments, options: as in `df.llm.{verb}`; what holds one value a row (a Series, a list of
            sampling parameters) and `journal` are not among them.
        llm: an `LLM`, for Dask's threads; or the arguments of one, by name, and each worker
            process makes it. Default: as in `df.llm.{verb}`, for Dask's threads.

    Returns:
        a Dask frame with the new columns, computed when it is asked for. Index and divisions are
        those of `frame`.

    Raises:
        ImportError: Dask is missing.
        InvalidRequestError: an argument is wrong.
    """
    return run


generate = _verb("generate")
chat = _verb("chat")
extract = _verb("extract")
classify = _verb("classify")
score = _verb("score")
filter = _verb("filter")
embed = _verb("embed")


class Step:
    """A verb for the partitions of a frame.

    Args:
        verb, arguments, options: of `df.llm`.
        llm: answers; or its arguments.
    """

    def __init__(
        self,
        verb: str,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        llm: LLM | Mapping[str, Any],
    ) -> None:
        self._verb = verb
        self._arguments = arguments
        self._options = {"use_tqdm": False, **options}
        self._llm = llm if isinstance(llm, LLM) else dict(llm)
        self._token = uuid.uuid4().hex  # two calls need not come to the same

    def __call__(self, partition: Any) -> Any:
        """Answer a partition, a pandas frame."""
        llm = self._llm
        return self._run(partition, llm if isinstance(llm, LLM) else _engine(llm))

    def describe(self, empty: Any) -> Any:
        """The result for a frame without rows: its columns do not depend on the model."""
        if isinstance(self._llm, LLM):
            return self._run(empty, self._llm)
        with LLM(device="cpu", dtype="float32") as demo:  # the real one may not fit here
            return self._run(empty, demo)

    def _run(self, frame: Any, llm: LLM) -> Any:
        method = getattr(DataFrameAccessor(frame), self._verb)
        return method(*self._arguments, llm=llm, **self._options)

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._llm, LLM):
            raise InvalidRequestError(
                "an LLM can't be sent to another process: pass its arguments, "
                "llm={'model': ...}, and each worker makes one",
                parameter="llm",
            )
        return self.__dict__

    def __dask_tokenize__(self) -> str:
        return self._token


def _engine(arguments: dict[str, Any]) -> LLM:
    """The engine of this process."""
    key = json.dumps(arguments, sort_keys=True, default=str)
    with _engines_lock:  # partitions come in several threads
        llm = _engines.get(key)
        if llm is None or not llm.is_healthy():
            llm = _engines[key] = LLM(**arguments)
        return llm


def _import_dask() -> None:
    try:
        import dask.dataframe  # noqa: F401
    except ImportError as error:
        raise ImportError("nbllm.dask needs Dask: pip install 'nbllm[dask]'") from error
