"""A loopback server that speaks the hub's HTTP API, and processes that know no other hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

TOKEN = "hf_abcdefgh"


@dataclass
class Repo:
    """One repository of the server, and how it misbehaves."""

    files: dict[str, bytes]
    sha: str = "1" * 40
    gated: bool = False
    private: bool = False
    announced_sizes: dict[str, int] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP API that downloads use."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, str]] = []  # method, path, Range header
        self.cut_after: dict[str, int] = {}  # file name -> bytes, then the connection breaks, once
        self.refused: set[str] = set()  # file names that get a 500 once they were cut

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        """Put a repository on the server, or a new version of it."""
        self.repos[name] = Repo(dict(files), **options)
        return self.repos[name]

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "GET"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms for the header's acknowledgement

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/api/v1/models/"):
            return self.answer_modelscope(path.removeprefix("/api/v1/models/"))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.server.repos.get(name)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not has_token):
            return self.refuse(401 if not has_token else 404, "RepoNotFound")
        if rest[:1] == ["resolve"]:
            if repo.gated and not has_token:
                return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return self.send_file(repo, rest[1], "/".join(rest[2:]))
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", repo.sha):
            return self.refuse(404, "RevisionNotFound")
        if rest[:1] == ["tree"]:
            return self.send_json(
                [
                    {
                        "type": "file",
                        "path": file,
                        "size": repo.announced_sizes.get(file, len(content)),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for file, content in repo.files.items()
                ]
            )
        return self.send_json(
            {
                "id": name,
                "modelId": name,
                "sha": repo.sha,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": [],
                "siblings": [{"rfilename": file} for file in repo.files],
            }
        )

    def answer_modelscope(self, path: str) -> None:
        """ModelScope's list of a repository's files, and one of them."""
        name, _, action = path.partition("/repo")
        query = dict(parse_qsl(urlsplit(self.path).query))
        repo = self.server.repos.get(name)
        if repo is None or query.get("FilePath", "config.json") not in repo.files:
            return self.refuse(404, "NotFound")
        if action != "/files":
            return self.send_body(repo.files[query["FilePath"]], "application/octet-stream")
        files = [
            {
                "Path": file,
                "Name": file,
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for file, content in repo.files.items()
        ]
        return self.send_json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def send_file(self, repo: Repo, revision: str, file: str) -> None:
        if revision not in ("main", repo.sha) or file not in repo.files:
            self.refuse(404, "EntryNotFound")
            return
        content, first, status = repo.files[file], 0, 200
        wanted = self.headers.get("Range", "")
        if self.command == "GET" and file in self.server.refused - self.server.cut_after.keys():
            self.refuse(500, "")
            return
        if wanted:
            first, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
        size = repo.announced_sizes.get(file, len(content))
        self.send_response(status)
        self.send_header("X-Repo-Commit", repo.sha)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header(
            "Content-Length", str(size - first if self.command == "HEAD" else len(content) - first)
        )
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut_after.pop(file, None)
        self.wfile.write(content[first : None if cut is None else first + cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def send_json(self, content: Any) -> None:
        self.send_body(json.dumps(content).encode(), "application/json")

    def send_body(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="session")
def _server() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(_server: Hub) -> Hub:
    """The server, without repositories and in good health."""
    _server.repos.clear()
    _server.log.clear()
    _server.cut_after.clear()
    _server.refused.clear()
    return _server


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_DOMAIN": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def run_client(hub: Hub, tmp_path: Path) -> Callable[..., Any]:
    """(script, argument, **environment) -> the JSON that the script prints as its last line.

    The script runs in a fresh process that knows the server, with the argument as JSON.
    """

    def run(
        script: str, argument: Any, *, file_size_limit: int | None = None, **environment: str
    ) -> Any:
        if file_size_limit is not None:
            limits = f"resource.RLIMIT_FSIZE, ({file_size_limit}, {file_size_limit})"
            script = f"import resource\nresource.setrlimit({limits})\n{script}"
        result = subprocess.run(
            [sys.executable, "-c", script, json.dumps(argument)],
            env=client_environment(hub, tmp_path / "home") | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


RESOLVE = """
import json, sys
from nbllm.errors import ModelLoadError
from nbllm.hub import resolve_model
for line in sys.argv[1:] or sys.stdin:
    try:
        answer = {"folder": str(resolve_model(**json.loads(line)))}
    except ModelLoadError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="session")
def _client(
    _server: Hub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    environment = client_environment(_server, tmp_path_factory.mktemp("home"))
    with subprocess.Popen(
        [sys.executable, "-c", RESOLVE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def resolve(
    hub: Hub, tmp_path: Path, _client: subprocess.Popen[str], run_client: Callable[..., Any]
) -> Callable[..., dict[str, str]]:
    """(name, **arguments of `resolve_model`) -> {"folder": ...} or {"error": ...}.

    The call happens in another process, which most tests share; with `environment` or
    `file_size_limit` in one of its own. Each test has its own cache.
    """

    def call(
        name: str,
        *,
        environment: dict[str, str] | None = None,
        file_size_limit: int | None = None,
        **arguments: Any,
    ) -> dict[str, str]:
        request = {"name": name, "cache_dir": str(tmp_path / "cache")} | arguments
        if environment is not None or file_size_limit is not None:
            options = environment or {}
            return run_client(RESOLVE, request, file_size_limit=file_size_limit, **options)
        assert _client.stdin is not None and _client.stdout is not None
        _client.stdin.write(json.dumps(request) + "\n")
        _client.stdin.flush()
        return json.loads(_client.stdout.readline())

    return call
