"""Jobs on disk: where journals are, what they belong to, and how a job goes on after a crash.

df.llm.generate("question", out="answer", journal="faq")   # the kernel dies at row 7,000
nbllm.resume("faq")                                        # the frame, whole
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import nbllm
from nbllm.dataframe.generate_verb import arguments_from_json
from nbllm.dataframe.journal import Journal, count_rows, import_arrow, write_whole
from nbllm.default_llm import default_llm
from nbllm.errors import JournalError
from nbllm.llm import LLM, last_created_llm

_DESCRIPTION = "job.json"
_INPUT = "input.parquet"
_NAME = re.compile(r"[\w][\w.\- ]{0,99}")


@dataclass(slots=True)
class JobDescription:
    """What is written beside a journal.

    Attributes:
        verb: name of the accessor's method.
        arguments: of it, as JSON; None if some can't be written (a function as template): the job
            is resumed by running its cell again.
        frame: what it runs on.
        num_rows: that are answered in the end.
        llm: who answers.
        owner: whose accessor it is; None is that of the frame, {"series": name} that of the frame's
            one column under this name, {"groupby": arguments, "column": name or None} that of
            groups of the frame, or of a column of them.
    """

    verb: str
    arguments: dict[str, Any] | None
    frame: pd.DataFrame
    num_rows: int
    llm: LLM
    owner: dict[str, Any] | None = None


def journal_folder(journal: Any) -> Path:
    """The folder of a job: a path as it is, or a name under `jobs` in `NBLLM_HOME` (~/.nbllm).

    Raises:
        JournalError: it is neither.
    """
    if isinstance(journal, os.PathLike):
        return Path(journal)
    if isinstance(journal, str):
        if os.sep in journal or journal.startswith("~"):
            return Path(journal).expanduser()
        if _NAME.fullmatch(journal):
            return _home() / journal
    raise JournalError(f"journal must be a name or a folder, got {journal!r}")


def open_journal(journal: Any, description: JobDescription | None) -> Journal:
    """The journal, locked; what the job is, is written beside it.

    Raises:
        JournalError: see `Journal`.
    """
    opened = Journal(journal_folder(journal))
    try:
        if description is not None:
            _write_description(opened.folder, description)
    except BaseException:
        opened.close()
        raise
    return opened


def jobs() -> pd.DataFrame:
    """The jobs in `NBLLM_HOME` (~/.nbllm), a row each, the last one first.

    Columns: name, verb, model, rows (of the frame), done (rows in the journal), changed (when it
    was written to last), resumable (`nbllm.resume` can go on).
    """
    rows = []
    for path in sorted(_home().glob(f"*/{_DESCRIPTION}"), key=_changed, reverse=True):
        try:
            described = _read(path.parent)
            done = count_rows(path.parent)
        except JournalError:
            continue
        rows.append(
            {
                "name": path.parent.name,
                "verb": described["verb"],
                "model": described["model"]["name"],
                "rows": described["num_rows"],
                "done": min(done, described["num_rows"]),
                "changed": pd.Timestamp(_changed(path), unit="s").floor("s"),
                "resumable": described["arguments"] is not None,
            }
        )
    columns = ["name", "verb", "model", "rows", "done", "changed", "resumable"]
    return pd.DataFrame(rows, columns=columns)


def resume(name: Any, *, llm: LLM | None = None, **changes: Any) -> Any:
    """Go on with a job whose kernel died, and return its frame; rows in the journal cost nothing.

    Args:
        name: of the job, or its folder.
        llm: who answers; default: the one that is open, if it is the job's model, else the job's
            model is loaded.
        changes: arguments of the call that are given anew, such as `use_tqdm`.

    Raises:
        JournalError: there is no such job, or it can't be resumed by name.
    """
    folder = journal_folder(name)
    described = _read(folder)
    if described["arguments"] is None:
        raise JournalError(
            f"the job {name!r} has a function, or another frame, among its arguments: run its cell "
            "again, with the same journal, and finished rows are found"
        )
    owner = _owner(_read_frame(folder), described.get("owner"))
    if llm is None:
        llm = find_llm(described["model"])
    method = getattr(owner.llm, described["verb"])
    return method(
        **(arguments_from_json(described["arguments"]) | {"llm": llm, "journal": folder} | changes)
    )


def _home() -> Path:
    return Path(os.environ.get("NBLLM_HOME", "~/.nbllm")).expanduser() / "jobs"


def describe(description: JobDescription) -> dict[str, Any]:
    """What a call is and who answers, as JSON."""
    llm = description.llm
    return {
        "nbllm": nbllm.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "verb": description.verb,
        "arguments": description.arguments,
        "owner": description.owner,
        "num_rows": description.num_rows,
        "model": {
            "name": llm.model_name,
            "identity": _identity(llm),
            "dtype": str(llm.config.dtype),
            "device": llm.config.device,
            "max_model_len": llm.config.max_model_len,
        },
    }


def find_llm(model: dict[str, Any]) -> LLM:
    """The open `LLM`, if it is the model that `describe` has told of; else that model, loaded."""
    if last_created_llm() is not None:
        llm = default_llm()
        if _identity(llm) == model["identity"]:
            return llm
    name = None if model["name"] == "nbllm-demo" else model["name"]
    return LLM(
        name, dtype=model["dtype"], device=model["device"], max_model_len=model["max_model_len"]
    )


def _identity(llm: LLM) -> str:
    try:
        return llm.identity
    except OSError:  # the folder is gone
        return ""


def _write_description(folder: Path, description: JobDescription) -> None:
    content = describe(description)
    arrow = import_arrow()
    try:
        if description.arguments is not None:
            table = arrow.Table.from_pandas(description.frame)
            write_whole(folder / _INPUT, lambda file: arrow.parquet.write_table(table, file))
    except (arrow.ArrowException, ValueError, TypeError) as error:
        # A column of no one type: the cell itself can be run again, though.
        content["arguments"] = None
        content["reason"] = str(error)
    text = json.dumps(content, indent=1)
    try:
        write_whole(folder / _DESCRIPTION, lambda file: file.write(text.encode()))
    except OSError as error:
        raise JournalError(f"the journal {folder} can't be written: {error}") from error


def _read(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JournalError(
            f"there is no job in {folder}; nbllm.jobs() lists those there are"
        ) from None
    except (OSError, ValueError) as error:
        raise JournalError(f"{folder / _DESCRIPTION} can't be read: {error}") from error
    return content


def _read_frame(folder: Path) -> pd.DataFrame:
    arrow = import_arrow()
    try:
        frame: pd.DataFrame = arrow.parquet.read_table(folder / _INPUT).to_pandas()
    except (OSError, arrow.ArrowException) as error:
        raise JournalError(f"{folder / _INPUT} can't be read: {error}") from error
    return frame


def _owner(frame: pd.DataFrame, owner: dict[str, Any] | None) -> Any:
    """What the method's accessor is that of, see `JobDescription`."""
    if owner is None:
        return frame
    if "series" in owner:
        return frame.iloc[:, 0].rename(owner["series"])
    groups = frame.groupby(**owner["groupby"])
    return groups if owner["column"] is None else groups[owner["column"]]


def _changed(path: Path) -> float:
    """When a file last got its name in a job's folder: all that is written there comes so."""
    return path.parent.stat().st_mtime
