"""The verbs of `df.llm` on Ray Data, beyond one machine: each worker owns an engine.

    import nbllm, ray

    faq = ray.data.read_parquet("s3://bucket/faq/")
    nbllm.ray.generate(
        faq, "question", out="answer", llm={"model": "Qwen/Qwen3-8B"}, num_workers=8
    ).write_parquet("s3://bucket/answers/")

A worker is an actor: it makes its `LLM` once, and answers the blocks that Ray gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbllm.dataframe.arrow_frames import map_table
from nbllm.errors import InvalidRequestError
from nbllm.llm import LLM

_BATCH_SIZE = 4096


def _verb(verb: str) -> Callable[..., Any]:
    def run(
        dataset: Any,
        *arguments: Any,
        llm: Mapping[str, Any] | None = None,
        num_workers: int = 1,
        num_gpus: float | None = None,
        batch_size: int = _BATCH_SIZE,
        **options: Any,
    ) -> Any:
        _check(llm, options)
        ray = _import_ray()
        engine = dict(llm or {})
        if num_gpus is None:
            num_gpus = 0 if engine.get("device") == "cpu" else _gpus_of_one(ray)
        return dataset.map_batches(
            Worker,
            fn_constructor_args=(engine, verb, arguments, options),
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_gpus=num_gpus,
        )

    run.__name__ = run.__qualname__ = verb
    run.__doc__ = f"""`df.llm.{verb}` for a Ray dataset.

    Args:
        dataset: a `ray.data.Dataset`.
        arguments, options: as in `df.llm.{verb}`; what holds one value a row (a Series, a list of
            sampling parameters) and `journal` are not among them.
        llm: arguments of `LLM`, by name: each worker makes one. None is the bundled demo model.
        num_workers: engines.
        num_gpus: of a worker; default: 1, or 0 with device="cpu" or where there are none.
        batch_size: rows that a worker answers together.

    Returns:
        a dataset with the new columns, computed when it is read.

    Raises:
        ImportError: Ray is missing.
        InvalidRequestError: `llm` is no dict, or there is a journal. What else is wrong, the
            workers say.
    """
    return run


generate = _verb("generate")
chat = _verb("chat")
extract = _verb("extract")
classify = _verb("classify")
score = _verb("score")
filter = _verb("filter")
embed = _verb("embed")


class Worker:
    """An actor with one engine.

    Args:
        engine: arguments of its `LLM`.
        verb, arguments, options: as in `map_table`.
    """

    def __init__(
        self,
        engine: Mapping[str, Any],
        verb: str,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> None:
        self._llm = LLM(**engine)
        self._verb = verb
        self._arguments = arguments
        self._options = {"use_tqdm": False, **options}  # Ray shows the progress

    def __call__(self, table: Any) -> Any:
        """Answer a block, a `pyarrow.Table`."""
        return map_table(table, self._verb, *self._arguments, llm=self._llm, **self._options)


def _check(llm: Any, options: Mapping[str, Any]) -> None:
    if llm is not None and not isinstance(llm, Mapping):
        raise InvalidRequestError(
            "an LLM can't be sent to the workers: pass its arguments, llm={'model': ...}",
            parameter="llm",
        )
    if options.get("journal") is not None:
        raise InvalidRequestError(
            "workers can't share a journal: write the dataset, and Ray's checkpoints hold it",
            parameter="journal",
        )


def _gpus_of_one(ray: Any) -> float:
    has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1
    return 1.0 if has_gpus else 0.0


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("nbllm.ray needs Ray Data: pip install 'nbllm[ray]'") from error
    return ray
