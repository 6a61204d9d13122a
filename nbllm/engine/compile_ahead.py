"""compile_ahead: kernels are compiled while the weights are being loaded.

The first launch of a kernel compiles it, and the first text would wait for a dozen of them, one
after the other. So steps of nobody are run meanwhile, on weights that hold anything: they write to
no slot and sample for nobody, but they launch what the first prompt and the tokens after it will.
Each has a thread of its own: the compiler leaves the interpreter's lock to others.

What only batches need is compiled later, by a thread beside the first texts: whoever is faster does
it, and nobody waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nbllm.engine.runner import Runner

logger = logging.getLogger(__name__)


@contextmanager
def compile_ahead(runner: Runner[Any]) -> Iterator[None]:
    """Run steps of nobody in threads of their own, and wait for them at the end.

    What fails there fails again where somebody hears of it.

    Args:
        runner: not used by others before the end.
    """
    threads = [
        threading.Thread(target=_try, args=(run,), name="nbllm-compile", daemon=True)
        for run in runner.rehearsals()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def compile_later(runner: Runner[Any]) -> None:
    """Run the other steps of nobody, one after the other, in a thread that ends by itself.

    Args:
        runner: in use by others, maybe released meanwhile.
    """

    def run_all() -> None:
        for run in runner.later_rehearsals():
            _try(run)

    threading.Thread(target=run_all, name="nbllm-compile", daemon=True).start()


def _try(run: Callable[[], None]) -> None:
    try:
        run()
    except Exception as error:
        logger.debug("a step of nobody failed", exc_info=error)
