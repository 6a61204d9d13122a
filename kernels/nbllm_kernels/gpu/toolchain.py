"""What Triton needs beside itself at run time, and words for the case that it is not there.

For every kind of kernel Triton compiles a small C program that launches it. So a machine without a
C compiler, or without Python's headers, fails at the first launch; slim images lack both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

_NEED = "GPU kernels need a C compiler and Python's headers at run time"
_REMEDY = (
    "Install them (Debian, Ubuntu: `apt install gcc python3-dev`; conda: `conda install -c "
    "conda-forge gcc`), or run on the CPU with device='cpu'."
)


def diagnose(error: BaseException) -> str | None:
    """What is missing, and how to get it, if that is why a launch failed.

    Args:
        error: what the first launch of a kernel raised.

    Returns:
        a sentence or two for the user, or None: the error has another cause.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(part) for part in chain)
    builds = any(isinstance(part, subprocess.CalledProcessError) for part in chain)
    compiler = os.environ.get("CC")
    missing = None
    if compiler is not None and shutil.which(compiler) is None:
        missing = f"CC={compiler!r} is no compiler"
    elif "C compiler" in text:
        missing = "no compiler was found"
    elif builds and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing = f"there is no Python.h in {sysconfig.get_paths()['include']}"
    return None if missing is None else f"{_NEED}; {missing}. {_REMEDY}"
