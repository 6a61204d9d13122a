"""Runs the kernels' tests on the CPU, through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NUM_PROCESSES = 2  # the interpreter keeps one core busy


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_every_kernel_passes_its_tests_in_the_interpreter() -> None:
    # In processes of their own: Triton reads the variable when it is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    files = [path for path in Path(__file__).parent.glob("test_*.py") if _has_kernels(path)]
    files.sort(key=lambda path: -path.stat().st_size)  # dealt out: the long ones to either
    processes = [
        subprocess.Popen(
            [*command, *map(str, files[part::NUM_PROCESSES])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    num_passed = 0
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-8000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None
        num_passed += int(passed[1])
    assert num_passed > 300


def _has_kernels(path: Path) -> bool:
    return path != Path(__file__) and "mark.gpu" in path.read_text(encoding="utf-8")
