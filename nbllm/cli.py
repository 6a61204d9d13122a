"""`nbllm` on the command line.

A subcommand is a module with `add_arguments(parser)` and `run(arguments) -> int`, named in
`_COMMANDS`; it is imported only when it is called, so that `nbllm --version` takes no time.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 64  # characters of a column that `nbllm demo` shows
# name -> module, one line of help
_COMMANDS = {
    "demo": ("nbllm.cli", "answer a DataFrame's column with the bundled model"),
    "serve": ("nbllm.server.commands.serve", "serve a model to OpenAI's clients"),
    "chat": ("nbllm.server.commands.chat", "talk to a server"),
    "complete": ("nbllm.server.commands.complete", "have a server go on with a text"),
    "run-batch": ("nbllm.server.commands.run_batch", "answer a file of requests"),
    "nbcheck": ("nbllm.nbcheck", "find what of saved notebooks GitHub would not show"),
    "bench": ("nbllm.bench.run", "measure speed, with a check of the tokens"),
}

_QUESTIONS = (
    "What is the capital of France?",
    "How many legs does a spider have?",
    "What is 17 + 25?",
    "Translate cheese into French.",
    "Positive or negative? The soup was cold.",
    "Extract the name and city as JSON: Grace lives in Oslo.",
    "What is the phone number of Grace?",
    "The future of AI is",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="nbllm", description="LLM inference in the notebook")
    parser.add_argument("--version", action="version", version=f"nbllm {version('nbllm')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == called:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    from nbllm.errors import NbllmError

    try:
        return int(parsed.run(parsed))
    except NbllmError as error:  # says what to do; its traceback does not
        sys.stderr.write(f"nbllm {parsed.command}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nbllm demo`."""
    parser.add_argument("question", nargs="*", help="your own questions instead of the samples")
    parser.add_argument("--model", help="folder or name on the hub; default: the bundled model")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def run(arguments: argparse.Namespace) -> int:
    """Answer a small DataFrame's column and show the frame and the speed.

    Returns:
        0, or 1 if a row failed.
    """
    import pandas as pd

    from nbllm.llm import LLM
    from nbllm.sampling_params import SamplingParams

    frame = pd.DataFrame({"question": list(arguments.question or _QUESTIONS)})
    sys.stdout.write("Loading the model ...\n")
    sys.stdout.flush()
    started = time.perf_counter()
    with LLM(arguments.model, device=arguments.device) as llm:
        loaded = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=128)
        # As it is, not as a chat: the bundled model then gives the shortest answer.
        frame = frame.llm.generate("question", params, llm=llm, out="answer", chat=False)
        answered = time.perf_counter()
        num_tokens = int(llm.get_metrics()["generation_tokens"])
        device, name = llm.config.device, llm.model_name
    seconds = answered - loaded
    sys.stdout.write(
        f"\n{_table(frame)}\n\n"
        f"{name} on {device}: loaded in {loaded - started:.1f} s; {len(frame)} rows and "
        f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s\n"
    )
    return int(frame["answer_error"].notna().any())


def _shorten(text: str) -> str:
    return shorten(text, _WIDTH, placeholder=" ...")


def _table(frame: pd.DataFrame) -> str:
    """The frame as text: long cells cut, columns set from the left."""
    shown = frame.astype(object).fillna("").map(_shorten)
    shown = shown.loc[:, (shown != "").any()]  # no column of errors if there are none
    widths = {name: int(shown[name].str.len().max()) for name in shown.columns}
    formatters = {name: f"{{:<{width}}}".format for name, width in widths.items()}
    return shown.to_string(index=False, justify="left", formatters=formatters)


if __name__ == "__main__":
    sys.exit(main())
