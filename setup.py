"""The CPU's ops in C, once per instruction set; everything else is in pyproject.toml.

Each build is optional: without a compiler, or with one that refuses the flags, the package installs
all the same, and PyTorch's operators do the work.
"""

import platform

from setuptools import Extension, setup

FOLDER = "kernels/nbllm_kernels/cpu/"
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-Wno-psabi"]
BUILDS = {"_cpu": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    # What PyTorch asks of a CPU before it calls it AVX2 or AVX512.
    BUILDS["_cpu_avx2"] = ["-mavx2", "-mfma"]
    BUILDS["_cpu_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]

setup(
    ext_modules=[
        Extension(
            f"nbllm_kernels.{build}",
            [FOLDER + name + ".c" for name in ("elementwise", "attention", "linear", "sampling")],
            depends=[FOLDER + "vectors.h"],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for build, flags in BUILDS.items()
    ]
)
