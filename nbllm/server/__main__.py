"""`python -m nbllm.server`: the same as `nbllm serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nbllm.errors import NbllmError
from nbllm.server.commands.serve import add_arguments, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nbllm.server", description="serve a model")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except NbllmError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
