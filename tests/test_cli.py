"""The command line, as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbllm


def _nbllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbllm.cli", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )


def test_the_demo_answers_a_column_of_a_frame() -> None:
    done = _nbllm("demo")
    assert done.returncode == 0, done.stderr
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    assert ["question", "answer"] in lines
    assert ["What is the capital of France?", "Paris"] in lines
    assert ["What is 17 + 25?", "42"] in lines
    assert re.search(r"8 rows and \d+ tokens in [\d.]+ s, \d+ tokens/s", done.stdout)


def test_the_demo_answers_own_questions() -> None:
    done = _nbllm("demo", "What is the capital of Peru?", "Is it Zürich? Say: 日本")
    assert done.returncode == 0, done.stderr
    assert re.search(r"What is the capital of Peru\?\s+Lima", done.stdout)
    assert "2 rows" in done.stdout


def test_version_is_told_without_loading_torch() -> None:
    assert _nbllm("--version").stdout.strip() == f"nbllm {nbllm.__version__}"
    code = (
        "import sys, nbllm.cli\n"
        "try: nbllm.cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_explains_its_options() -> None:
    names = re.findall(r"^    (\w[\w-]*) ", _nbllm("--help").stdout, re.MULTILINE)
    assert {"demo", "bench"} <= set(names)
    for name in names:
        done = _nbllm(name, "--help")
        assert done.returncode == 0, done.stderr
        assert f"usage: nbllm {name}" in done.stdout


def test_a_wrong_model_is_one_line_on_standard_error(tmp_path: Path) -> None:
    done = _nbllm("demo", "--model", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert done.stderr.startswith("nbllm demo: there is no folder")
    assert "Traceback" not in done.stderr


def test_an_unknown_command_names_those_that_exist() -> None:
    done = _nbllm("dmeo")
    assert done.returncode == 2
    assert "demo" in done.stderr.replace("dmeo", "")
