"""Gives frames their `.llm`, whichever of their package and nbllm is imported first.

Importing nbllm must not import pandas or polars. If one is there already, its frames get their
`.llm` at once; if not, a finder waits at the front of `sys.meta_path` for its import, lets the
others do the work, registers after the package has run, and is gone. Whoever only looks whether
there is such a package changes nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTER_IN = {
    "pandas": "nbllm.dataframe.accessor",
    "polars": "nbllm.dataframe.polars_frames",
}
"""Packages, and the modules whose `register` gives their frames `.llm`."""

logger = logging.getLogger(__name__)


def register_frames() -> None:
    """Register now, or when a package is imported. Idempotent."""
    for package in _REGISTER_IN:
        if package in sys.modules:
            _register(package)
        elif not any(
            isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path
        ):
            sys.meta_path.insert(0, _Finder(package))


def _register(package: str) -> None:
    try:
        import_module(_REGISTER_IN[package]).register()
    except Exception:  # the user asked for the package, and shall have it
        logger.warning("%s's frames could not get their .llm", package, exc_info=True)


class _Finder(MetaPathFinder):
    """Wraps the loader of a package, until it has run."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    """The loader of a package, and what comes after it."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # Nothing of ours stays in the package: its resources are found through its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register(module.__name__)
