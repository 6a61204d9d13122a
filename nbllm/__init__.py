"""nbllm: an LLM inference engine that lives inside the notebook kernel.

    from nbllm import LLM, SamplingParams

    llm = LLM()  # the bundled demo model; or a folder, or a name on the hub
    outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0))

Importing nbllm is cheap: torch, pandas and the rest are imported when they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbllm.dataframe.registration import register_frames

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "nbllm.llm",
    "SamplingParams": "nbllm.sampling_params",
    "PoolingParams": "nbllm.pooling_params",
    "BeamSearchParams": "nbllm.sampling_params",
    "RepetitionDetectionParams": "nbllm.sampling_params",
    "RequestOutputKind": "nbllm.sampling_params",
    "StructuredOutputsParams": "nbllm.sampling_params",
    "set_default_llm": "nbllm.default_llm",
    "jobs": "nbllm.dataframe.jobs",
    "resume": "nbllm.dataframe.jobs",
    "reproduce": "nbllm.dataframe.provenance",
    "map_table": "nbllm.dataframe.arrow_frames",
    "serve": "nbllm.server.serve_model",
    "SamplingControls": "nbllm.widgets.sampling_controls",
    "Playground": "nbllm.widgets.playground",
    "Dashboard": "nbllm.widgets.dashboard",
    "allow_nested_asyncio": "nbllm.nested_asyncio",
    "TextPrompt": "nbllm.inputs",
    "TokensPrompt": "nbllm.inputs",
    "RequestOutput": "nbllm.outputs",
    "CompletionOutput": "nbllm.outputs",
    "Logprob": "nbllm.outputs",
    "BeamSearchOutput": "nbllm.outputs",
    "EmbeddingOutput": "nbllm.outputs",
    "EmbeddingRequestOutput": "nbllm.outputs",
    "EngineSnapshot": "nbllm.outputs",
    "RequestSnapshot": "nbllm.outputs",
    "NbllmError": "nbllm.errors",
    "InvalidRequestError": "nbllm.errors",
    "PromptTooLongError": "nbllm.errors",
    "ModelLoadError": "nbllm.errors",
    "OutOfMemoryError": "nbllm.errors",
    "MissingCompilerError": "nbllm.errors",
    "RequestFailedError": "nbllm.errors",
    "JournalError": "nbllm.errors",
    "EngineClosedError": "nbllm.errors",
    "EngineDeadError": "nbllm.errors",
    "Interrupted": "nbllm.errors",
}

_MODULES = ("dask", "ray")  # `nbllm.ray.generate`

__all__ = ["__version__", *_EXPORTS]

last: Any = None
"""The frame that the last interrupted or failed DataFrame call had come to."""

register_frames()

if TYPE_CHECKING:
    from nbllm.dataframe.arrow_frames import map_table
    from nbllm.dataframe.jobs import jobs, resume
    from nbllm.dataframe.provenance import reproduce
    from nbllm.default_llm import set_default_llm
    from nbllm.errors import (
        EngineClosedError,
        EngineDeadError,
        Interrupted,
        InvalidRequestError,
        JournalError,
        MissingCompilerError,
        ModelLoadError,
        NbllmError,
        OutOfMemoryError,
        PromptTooLongError,
        RequestFailedError,
    )
    from nbllm.inputs import TextPrompt, TokensPrompt
    from nbllm.llm import LLM
    from nbllm.nested_asyncio import allow_nested_asyncio
    from nbllm.outputs import (
        BeamSearchOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        EngineSnapshot,
        Logprob,
        RequestOutput,
        RequestSnapshot,
    )
    from nbllm.pooling_params import PoolingParams
    from nbllm.sampling_params import (
        BeamSearchParams,
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )
    from nbllm.server.serve_model import serve
    from nbllm.widgets.dashboard import Dashboard
    from nbllm.widgets.playground import Playground
    from nbllm.widgets.sampling_controls import SamplingControls


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext nbllm`: the magics `%%llm` and `%nbllm`, see `nbllm.magics`."""
    importlib.import_module("nbllm.magics").register(ipython)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"nbllm.{name}")
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'nbllm' has no attribute {name!r}")
    if module.startswith("nbllm.dataframe."):
        # Its import gives frames their `.llm`, for which that module must not be half imported.
        importlib.import_module("pandas")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
