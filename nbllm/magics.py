"""The magics of `%load_ext nbllm`.

%%llm --temperature 0.7 --out answer        the cell is the prompt, `{name}` a variable
Name three cities in {country}.

%nbllm ps                                   the models of this kernel and who uses them
%nbllm close llm                            give the memory of one back
"""

from __future__ import annotations

import html
import os
import shlex
import string
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from nbllm.default_llm import default_llm
from nbllm.errors import InvalidRequestError, NbllmError
from nbllm.llm import LLM, open_llms
from nbllm.sampling_params import SamplingParams

_INTERVAL_S = 0.1
_STATM = Path("/proc/self/statm")  # sizes of this process, in pages
_NUMBERS: dict[str, type] = {  # options of %%llm that are fields of SamplingParams
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
}
_COLUMNS = ("name", "model", "device", "running", "waiting", "pages in use", "used by")
# What `LLM.snapshot` calls them -> what people do.
_SOURCES = {"cell": "cells", "dataframe": "frames", "server": "clients", "widget": "widgets"}


def register(ipython: Any) -> None:
    """Add `%%llm` and `%nbllm` to a shell."""
    magics = _Magics(ipython)
    ipython.register_magic_function(magics.llm, "cell", "llm")
    ipython.register_magic_function(magics.nbllm, "line", "nbllm")


def fill_in(template: str, variables: Mapping[str, Any]) -> str:
    """The text with each `{name}` replaced, as in an f-string, without arbitrary expressions.

    `{name.attribute}`, `{name[0]}`, `{name!r}` and `{name:.2f}` work; `{{` and `}}` are braces.

    Raises:
        InvalidRequestError: there is no such variable, or a field is not well-formed.
    """
    try:
        return string.Formatter().vformat(template, (), variables)
    except KeyError as error:
        problem = f"there is no variable {error}"
    except IndexError:
        problem = "a field needs the name of a variable"
    except (ValueError, AttributeError, TypeError) as error:
        problem = str(error)
    raise InvalidRequestError(
        f"{problem}; write {{{{ and }}}} for braces, or give --raw", parameter="prompt"
    )


class _Magics:
    """What a shell calls."""

    def __init__(self, ipython: Any) -> None:
        from IPython.core.error import UsageError

        self._shell = ipython
        self._usage_error = UsageError
        self._llm_options = _llm_parser()
        self._nbllm_options = _nbllm_parser()
        # What `%%llm?` shows.
        type(self).llm.__doc__ = self._llm_options.format_help()
        type(self).nbllm.__doc__ = self._nbllm_options.format_help()

    def llm(self, line: str, cell: str) -> None:
        options = self._parse(self._llm_options, line)
        variables = self._shell.user_ns
        llm = self._variable(options.llm, LLM) if options.llm else default_llm()
        if options.out is not None and not options.out.isidentifier():
            raise self._usage_error(f"--out needs a name, not {options.out!r}")
        try:
            text = cell.strip("\n") if options.raw else fill_in(cell.strip("\n"), variables)
            params = self._params(options, llm)
            prompt = _prompt(llm, text, options)
        except InvalidRequestError as error:
            raise self._usage_error(str(error)) from error
        shown = _Cell(options.markdown) if hasattr(self._shell, "kernel") else _Terminal()
        answer = ""
        try:
            outputs: Any = llm.stream(prompt, params)
            with closing(outputs):
                for output in outputs:
                    answer = output.outputs[0].text
                    shown.show(answer)
        finally:  # an interrupted answer is kept as far as it has come
            shown.end(answer)
            self._shell.displayhook.update_user_ns(answer)
            if options.out is not None:
                variables[options.out] = answer

    def nbllm(self, line: str) -> None:
        options = self._parse(self._nbllm_options, line)
        if options.command == "ps":
            rows = [self._describe(llm) for llm in open_llms()]
            if rows:
                _display_table([_COLUMNS, *rows], _memory())
            else:
                _display("no model is open")
        elif options.command == "close":
            self._close(options.name)

    def _parse(self, parser: Any, line: str) -> Any:
        try:
            return parser.parse_args(shlex.split(line))
        except ValueError as error:  # of quotes
            raise self._usage_error(str(error)) from error

    def _params(self, options: Any, llm: LLM) -> SamplingParams:
        params = llm.get_default_sampling_params()
        if options.params is not None:
            given = self._variable(options.params, object)
            params = getattr(given, "params", given)  # of SamplingControls
            if not isinstance(params, SamplingParams):
                raise self._usage_error(f"{options.params} is no SamplingParams")
        changes = {name: getattr(options, name) for name in (*_NUMBERS, "stop")}
        return params.clone(**{name: v for name, v in changes.items() if v is not None})

    def _variable(self, name: str, kind: type) -> Any:
        value = self._shell.user_ns.get(name)
        if value is None or not isinstance(value, kind):
            what = "variable" if kind is object else kind.__name__
            raise self._usage_error(f"there is no {what} called {name!r}")
        return value

    def _names(self, llm: LLM) -> list[str]:
        """The variables that hold it."""
        variables = self._shell.user_ns.items()
        return [name for name, value in variables if value is llm and not name.startswith("_")]

    def _describe(self, llm: LLM) -> list[str]:
        """A row of `%nbllm ps`."""
        name = ", ".join(self._names(llm)) or "-"
        row = [name, llm.model_name, f"{llm.config.device} {llm.config.dtype}"]
        try:
            seen = llm.snapshot(0, timeout_s=2.0)
        except (NbllmError, TimeoutError) as error:
            return [*row, "", "", "", str(error) or "busy"]
        users = [f"server {server.base_url}" for server in llm.servers]
        users += [
            f"{count:,} of {_SOURCES.get(source, source)}"
            for source, count in seen.num_by_source.items()
        ]
        counts = (seen.metrics["num_requests_running"], seen.metrics["num_requests_waiting"])
        pages = f"{seen.num_used_blocks:,} of {seen.num_blocks:,}"
        return [*row, *(f"{count:,}" for count in counts), pages, ", ".join(users) or "-"]

    def _close(self, name: str | None) -> None:
        llms = open_llms()
        if name is not None:
            named = [llm for llm in llms if name in self._names(llm)]
            llms = named or [llm for llm in llms if llm.model_name == name]
        if len(llms) != 1:
            known = ", ".join(
                name for llm in open_llms() for name in (*self._names(llm), llm.model_name)
            )
            problem = "which one" if llms else "no open model has that name"
            raise self._usage_error(f"{problem}? There are: {known or 'none'}")
        llms[0].close()
        _display(repr(llms[0]))


class _Cell:
    """The cell's output, replaced in place through its display id: it is saved as it ends."""

    def __init__(self, is_markdown: bool) -> None:
        from IPython.display import display

        self._kinds = ("text/plain", "text/markdown") if is_markdown else ("text/plain",)
        self._handle: Any = display(self._bundle(""), raw=True, display_id=True)
        self._last_shown = 0.0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last_shown >= _INTERVAL_S:
            self._last_shown = now
            self._handle.update(self._bundle(text), raw=True)

    def end(self, text: str) -> None:
        self._handle.update(self._bundle(text), raw=True)

    def _bundle(self, text: str) -> dict[str, str]:
        return dict.fromkeys(self._kinds, text)


class _Terminal:
    """IPython's terminal has no output to replace: what is new is written behind the old."""

    def __init__(self) -> None:
        self._num_written = 0

    def show(self, text: str) -> None:
        sys.stdout.write(text[self._num_written :])
        sys.stdout.flush()
        self._num_written = len(text)

    def end(self, text: str) -> None:
        self.show(text)
        sys.stdout.write("\n")


def _prompt(llm: LLM, text: str, options: Any) -> Any:
    """The cell as a user's message, or as it is."""
    if not text.strip():
        raise InvalidRequestError("the cell has no prompt", parameter="prompt")
    tokenizer = llm.get_tokenizer()
    has_template = bool(llm.chat_template or tokenizer.chat_template)
    if options.complete or (not has_template and options.system is None):
        return text
    messages = [{"role": "user", "content": text}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return llm.render_chat(messages)


def _llm_parser() -> Any:
    from IPython.core.magic_arguments import MagicArgumentParser

    parser = MagicArgumentParser(
        prog="%%llm",
        description="Answer the cell's text with a model; {name} stands for a variable. The answer "
        "is shown as it grows, and is _ afterwards.",
    )
    for name, kind in _NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--stop", action="append", help="a string that ends the text; repeatable")
    parser.add_argument("--params", help="name of a SamplingParams or SamplingControls")
    parser.add_argument("--out", help="name of a variable that gets the text")
    parser.add_argument("--llm", help="name of an LLM; default: the one that was made last")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--complete", action="store_true", help="go on with the text: no chat")
    parser.add_argument("--raw", action="store_true", help="braces are just braces")
    parser.add_argument("--markdown", action="store_true", help="show the answer as Markdown")
    return parser


def _nbllm_parser() -> Any:
    from IPython.core.magic_arguments import MagicArgumentParser

    parser = MagicArgumentParser(prog="%nbllm", description="The models of this kernel.")
    parser.add_argument(
        "command",
        choices=["ps", "close"],
        help="ps: the open models and who uses them; close: give the memory of one back",
    )
    parser.add_argument("name", nargs="?", help="close: a variable, or the model's name")
    return parser


def _memory() -> str:
    """What this process holds of the machine's memory, and of each GPU's."""
    held = []
    for device in sorted({llm.config.device for llm in open_llms()}):
        if device.startswith("cuda"):
            import torch

            held.append(f"{torch.cuda.memory_reserved(device) / 2**30:.2f} GiB of {device}")
    if _STATM.exists():  # Linux
        num_pages = int(_STATM.read_text().split()[1])
        held.append(f"{num_pages * os.sysconf('SC_PAGE_SIZE') / 2**30:.2f} GiB of main memory")
    return f"this kernel has {' and '.join(held)}" if held else ""


def _display_table(rows: Sequence[Sequence[str]], caption: str) -> None:
    """Show rows, the first of which is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    tags = ("th", *("td" for _ in rows[1:]))
    marked = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(tags, rows, strict=True)
    ]
    body = "".join(f"<tr>{row}</tr>" for row in marked)
    table = f"<table>{body}</table>{html.escape(caption)}"
    _display("\n".join([*lines, caption]), table)


def _display(text: str, table: str | None = None) -> None:
    from IPython.display import display

    bundle = {"text/plain": text}
    if table is not None:
        bundle["text/html"] = table
    display(bundle, raw=True)
