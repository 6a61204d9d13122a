"""A disk that is full, or may not be written, fails a download with a typed error and nothing else.

Downloads are all that nbllm leaves on a disk. Each try starts from a cache that holds an older
version of the model, and each is followed by one with room.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")

CLIENT = """
import errno, json, os, resource, shutil, sys
from pathlib import Path
from nbllm.errors import ModelLoadError
from nbllm.hub import resolve_model

argument = json.loads(sys.argv[1])
cache, old_folder = Path(argument["cache"]), Path(argument["old_folder"])
old_files = {path.name: path.read_bytes() for path in old_folder.iterdir()}

def resolve():
    try:
        return {"folder": resolve_model("me/tiny", cache_dir=cache)}
    except ModelLoadError as error:
        return {"error": str(error)}

def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

remaining, lasting = None, False  # changes of the disk until one fails

def on_event(event, args):
    global remaining
    changes = event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove")
    changes = changes or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if remaining is None or not changes or not str(args[0]).startswith(str(cache.parent)):
        return
    remaining -= 1
    if remaining == 0 or lasting and remaining < 0:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

sys.addaudithook(on_event)

def is_new(folder):
    return (folder / "model.safetensors").read_bytes() == b"n" * 300_000

def report():
    tried = resolve()
    limit(resource.RLIM_INFINITY)
    globals()["remaining"] = None
    kept = {path.name: path.read_bytes() for path in old_folder.iterdir()} == old_files
    right = "error" in tried or is_new(tried["folder"])
    again = resolve()
    right_again = "folder" in again and is_new(again["folder"])
    shutil.rmtree(cache)
    shutil.copytree(saved, cache, symlinks=True)
    return {"error": tried.get("error"), "kept": kept, "right": right, "right_again": right_again}

saved = cache.with_name("saved")
shutil.copytree(cache, saved, symlinks=True)
reports = []
"""

AT_LIMITS = """
for num_bytes in argument["limits"]:
    limit(num_bytes)
    reports.append(report())
print(json.dumps(reports))
"""

AT_CHANGES = """
for lasting in (False, True):
    for at in range(1, argument["num_points"] + 1):
        remaining = at
        reports.append(report())
print(json.dumps(reports))
"""


@pytest.fixture
def old_version(hub: Any, resolve: Callable[..., dict[str, str]], tmp_path: Path) -> dict[str, Any]:
    """A cache with one version of a model, of which the hub has another by now."""
    old = {"config.json": b'{"version": 1}', "model.safetensors": b"o" * 300_000}
    hub.add("me/tiny", old)
    folder = resolve("me/tiny")["folder"]
    new = {"config.json": b'{"version": 2}', "model.safetensors": b"n" * 300_000}
    hub.add("me/tiny", new, sha="2" * 40)
    return {"cache": str(tmp_path / "cache"), "old_folder": folder}


def check(reports: list[dict[str, Any]], cause: str) -> None:
    for report in reports:
        assert report["kept"], "the old version is damaged"
        assert report["right"], "neither an error nor the new version"
        assert report["right_again"], "with room the download does not succeed"
        if report["error"] is not None:
            assert "downloading me/tiny failed" in report["error"] and cause in report["error"]


def test_a_disk_that_is_full_after_any_number_of_bytes_fails_the_download_alone(
    old_version: dict[str, Any], run_client: Callable[..., Any]
) -> None:
    limits = [0, 1, 13, 39, *range(41, 300_000, 20_000), 299_999]
    reports = run_client(CLIENT + AT_LIMITS, old_version | {"limits": limits})
    assert len(reports) == 20
    assert all(report["error"] for report in reports)
    check(reports, "File too large")


def test_a_folder_that_becomes_read_only_at_any_change_fails_the_download_alone(
    old_version: dict[str, Any], run_client: Callable[..., Any]
) -> None:
    reports = run_client(CLIENT + AT_CHANGES, old_version | {"num_points": 20})
    read_only_from_the_start = reports[20]
    assert read_only_from_the_start["error"] is not None
    check(reports, "Read-only file system")
