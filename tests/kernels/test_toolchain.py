"""A machine on which Triton can build nothing: the user is told what to install."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform"
)

SOURCE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&module); }
"""


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget_compiler()
    yield
    forget_compiler()


def forget_compiler() -> None:
    """Some versions of Triton look for it once."""
    from triton.runtime import build

    find = getattr(build, "_find_compiler", None)
    if hasattr(find, "cache_clear"):
        find.cache_clear()


def build_error() -> BaseException:
    """What Triton raises when it builds the program that launches a kernel."""
    from triton.runtime.build import compile_module_from_src

    with pytest.raises(Exception) as caught:
        compile_module_from_src(SOURCE, "probe")
    return caught.value


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbllm_kernels.gpu.toolchain import diagnose

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    message = diagnose(build_error())
    assert message is not None and "no compiler was found" in message and "apt install" in message


def test_a_wrong_cc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbllm_kernels.gpu.toolchain import diagnose

    monkeypatch.setenv("CC", "/no/such/cc")
    message = diagnose(build_error())
    assert message is not None and "CC='/no/such/cc'" in message


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nbllm_kernels.gpu.toolchain import diagnose

    paths = sysconfig.get_paths() | {"include": str(tmp_path / "include")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: paths)
    message = diagnose(build_error())
    assert message is not None and f"no Python.h in {paths['include']}" in message


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbllm_kernels.gpu.toolchain import diagnose

    monkeypatch.delenv("CC", raising=False)
    assert diagnose(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
