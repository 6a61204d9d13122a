"""Exceptions -> the statuses and bodies that a client gets."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response

from nbllm.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    NbllmError,
    RequestFailedError,
)
from nbllm.server.protocol import error_body, to_json
from nbllm.server.request_log import note_error

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 3


class BodyTooLargeError(Exception):
    """The body has more bytes than the server takes."""


class BodyTooSlowError(Exception):
    """The body did not come in time."""


class ModelNotFoundError(InvalidRequestError):
    """Another model than the one that is served here."""


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response with `body` as JSON."""
    return Response(to_json(body), status, headers, media_type="application/json")


def refusal(status: int, message: str, parameter: str | None = None) -> Response:
    """A response that tells what is wrong."""
    # Not all who are turned away should come back at the same moment.
    wait_s = random.randint(1, MAX_RETRY_AFTER_S)
    retry = {"Retry-After": str(wait_s)} if status in (429, 503) else None
    return json_response(error_body(message, status, parameter), status, retry)


def stream_error(error: Exception) -> dict[str, Any]:
    """The event that ends a stream whose status was sent before."""
    note_error(error)
    return error_body(_message(error), _status(error), getattr(error, "parameter", None))


def is_clients_fault(error: Exception) -> bool:
    """Whether the request asked for what can't be done; known before it runs, or only then."""
    if isinstance(error, RequestFailedError):
        return error.parameter is not None
    return isinstance(error, InvalidRequestError)


def add_error_handlers(app: FastAPI) -> None:
    """Have every error of a route answered in OpenAI's form."""
    app.add_exception_handler(NbllmError, _on_error)
    app.add_exception_handler(BodyTooLargeError, _on_error)
    app.add_exception_handler(BodyTooSlowError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_exception_handler(404, _on_unknown_route)
    app.add_exception_handler(405, _on_unknown_route)


def _status(error: Exception) -> int:
    if is_clients_fault(error):
        return 404 if isinstance(error, ModelNotFoundError) else 400
    if isinstance(error, (EngineClosedError, EngineDeadError)):
        return 503
    if isinstance(error, RequestFailedError) and _is_out_of_memory(error.__cause__):
        return 503
    return {BodyTooLargeError: 413, BodyTooSlowError: 408}.get(type(error), 500)


def _message(error: Exception) -> str:
    """What a client may read: our own words, never a path or a traceback of something else."""
    if is_clients_fault(error) or isinstance(error, (BodyTooLargeError, BodyTooSlowError)):
        return str(error)
    if isinstance(error, EngineClosedError):
        return "the engine is closed"
    if isinstance(error, EngineDeadError):
        return "the engine is dead: its kernel must be restarted"
    return "there is not enough memory now" if _status(error) == 503 else "the request failed"


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        error = error.__cause__
    return False


async def _on_error(request: Request, error: Exception) -> Response:
    note_error(error)
    if not isinstance(error, (NbllmError, BodyTooLargeError, BodyTooSlowError)):
        logger.error("a request failed", exc_info=error)
    return refusal(_status(error), _message(error), getattr(error, "parameter", None))


async def _on_unknown_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    known = "this route takes another method" if status == 405 else "there is no such route"
    return refusal(status, known)
