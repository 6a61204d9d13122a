"""Every exception nbllm raises on purpose.

NbllmError
├── InvalidRequestError (ValueError)      one request is wrong; `.parameter` names the culprit
│   └── PromptTooLongError                the prompt does not fit into `max_model_len`
├── ModelLoadError                        a checkpoint can't be found, read or understood
├── OutOfMemoryError (MemoryError)        the configuration does not fit; says what to lower
├── MissingCompilerError                  GPU kernels can't be built on this machine
├── RequestFailedError                    a step of the engine failed while it ran this request
├── JournalError                          a job's journal can't be read or written
├── EngineClosedError                     `LLM.close()` was called
└── EngineDeadError                       the engine can't go on; `__cause__` says why

Interrupted (KeyboardInterrupt)           Ctrl-C stopped one call; `.partial` is what was finished

`InvalidRequestError` and `RequestFailedError` concern one request: all others go on.
After `EngineDeadError` every request, running or new, gets the same error.
"""

from __future__ import annotations

from typing import Any


class NbllmError(Exception):
    """Base class of all errors of nbllm."""


class InvalidRequestError(NbllmError, ValueError):
    """A request (prompt or sampling parameters) that can't be served as it is.

    Attributes:
        parameter: the name of the parameter at fault, as the user wrote it, or None.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for even one generated token."""


class ModelLoadError(NbllmError):
    """A model folder, file or tensor is missing, broken or of an unknown kind."""


class OutOfMemoryError(NbllmError, MemoryError):
    """The model or its KV cache does not fit into the memory that is free."""


class MissingCompilerError(NbllmError):
    """GPU kernels need a C compiler and Python's headers, and they are not there."""


class RequestFailedError(NbllmError):
    """The engine hit an exception in a step of this request; `__cause__` is that exception.

    Attributes:
        parameter: what the request asked for, if it is that which could not go on, or None.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class JournalError(NbllmError):
    """A job's journal on disk can't be read or written; the rows in it are safe."""


class EngineClosedError(NbllmError):
    """The engine was closed; make a new `LLM`."""


class EngineDeadError(NbllmError):
    """The engine can't recover in this process; `__cause__` is what killed it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or the notebook's Stop button, ended a call; the engine and its other callers go on.

    A KeyboardInterrupt, so that "Run All" stops at the cell.

    Attributes:
        partial: what was finished by then, in the form that the call would have returned.
    """

    def __init__(self, message: str = "interrupted", *, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial
