"""asyncio.run() in a notebook's cell, for those who must call it. nbllm itself never needs it."""

from __future__ import annotations

import importlib


def allow_nested_asyncio() -> None:
    """Let a running event loop, the notebook's, be entered again: `asyncio.run` works in a cell.

    Changes asyncio for the whole process, so it is never done unasked. Uses `nest_asyncio2`, the
    maintained fork of `nest_asyncio`, or that one.

    Raises:
        ImportError: neither is installed.
    """
    try:
        module = importlib.import_module("nest_asyncio2")
    except ImportError:
        module = importlib.import_module("nest_asyncio")
    module.apply()
