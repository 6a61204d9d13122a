"""Files of a model's folder, which somebody else made: found and read without trusting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbllm.errors import ModelLoadError

_MAX_JSON_BYTES = 64 * 1024**2  # the largest index files have a few MB


def find_file(folder: Path, name: object) -> Path:
    """The file `name` in the folder, which must be a plain file that lies in it.

    A cache of the hub links its files into the `blobs` folder of the same repository, which is
    fine: it is the client that made those links.

    Raises:
        ModelLoadError: there is none, or it is a path or a link to somewhere else.
    """
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
        raise ModelLoadError(f"file {name!r} in {folder}: not a plain file name")
    path = folder / name
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        blobs = home.parent.parent / "blobs"
        is_cached = home.parent.name == "snapshots" and target.parent == blobs
        if target.parent != home and not is_cached:
            raise ModelLoadError(
                f"{name} in {folder} is a link that leaves the folder: put the file itself there"
            )
    if not path.exists():
        raise ModelLoadError(f"{name} is missing in {folder}")
    if not path.is_file():
        raise ModelLoadError(f"{name} in {folder} is not a file")
    return path


def has_file(folder: Path, name: str) -> bool:
    """True if something of that name is in the folder, be it good or bad."""
    path = folder / name
    return path.exists() or path.is_symlink()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder.

    Raises:
        ModelLoadError: as `find_file`, or the content is no JSON object; names the file.
    """
    path = find_file(folder, name)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadError(f"{name} in {folder}: more than {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{name} in {folder}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{name} in {folder}: expected a JSON object")
    return content
