"""Gives pandas its `.llm` accessors, whichever of pandas and nbllm is imported first.

Importing nbllm must not import pandas. If pandas is there already, the accessors are registered at
once; if not, a finder waits at the front of `sys.meta_path` for its import, lets the others do the
work, registers the accessors after pandas has run, and is gone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def register_with_pandas() -> None:
    """Register now, or when pandas is imported. Idempotent."""
    if "pandas" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PandasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PandasFinder())


def _register() -> None:
    try:
        from nbllm.dataframe.accessor import register

        register()
    except Exception:  # the user asked for pandas, and shall have it
        logger.warning("the .llm accessors could not be registered", exc_info=True)


class _PandasFinder(MetaPathFinder):
    """Wraps the loader of pandas, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "pandas":
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """The loader of pandas, and what comes after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # Nothing of ours stays in pandas: its resources are found through its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
