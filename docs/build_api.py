"""Makes the API reference out of the docstrings.

python docs/build_api.py [FOLDER]    # default: build/api
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

MODULES = (
    "nbllm",
    "nbllm.dataframe.accessor",
    "nbllm.dataframe.series_accessor",
    "nbllm.dataframe.extract",
    "nbllm.dataframe.classify",
    "nbllm.dataframe.embed",
    "nbllm.dataframe.similarity",
    "nbllm.dataframe.semantic_join",
    "nbllm.dataframe.summarize",
    "nbllm.dataframe.citations",
    "nbllm.dataframe.frame_job",
    "nbllm.dask",
    "nbllm.ray",
    "nbllm.server.handle",
    "nbllm_kernels",
)
"""The public names, what hangs on frames and servers, and the kernels."""


def build(folder: Path) -> None:
    """Write a page for each of `MODULES`, and an index, to `folder`."""
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        # Series and Index take types in pandas' stubs, but not when pdoc evaluates them.
        warnings.filterwarnings("ignore", r"Error parsing type annotation pd\.(Series|Index)")
        pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
