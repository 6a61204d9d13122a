"""Names of models become folders: the real clients against a loopback server that speaks the hub's
API, each case in a process of its own, since the clients read their settings at import."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nbllm import ModelLoadError
from nbllm.hub import DEMO_FOLDER, resolve_model

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

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "GET"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range", "")))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.server.repos.get(name)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not has_token):
            return self.refuse(401 if not has_token else 404, "RepoNotFound")
        if rest[:1] == ["resolve"]:
            if repo.gated and not has_token:
                return self.refuse(401, "GatedRepo")
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
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


RunClient = Callable[..., dict[str, Any]]

RESOLVE = """
import json, sys
from nbllm.errors import ModelLoadError
from nbllm.hub import resolve_model
try:
    print(json.dumps({"folder": str(resolve_model(**json.loads(sys.argv[1])))}))
except ModelLoadError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def run_client(hub: Hub, tmp_path: Path) -> RunClient:
    """Run a script in a fresh process that knows the server; its last line is JSON."""

    def run(
        script: str, argument: Any, *, file_size_limit: int | None = None, **environment: str
    ) -> dict[str, Any]:
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

        def limit() -> None:
            if file_size_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))

        result = subprocess.run(
            [sys.executable, "-c", script, json.dumps(argument)],
            env=kept | settings | environment,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=limit,
        )
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout.splitlines()[-1]))

    return run


def small_repo() -> Repo:
    return Repo(
        {
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "merges.txt": b"",
            "README.md": b"#",
            "model.safetensors": b"s" * 5000,
            "consolidated.safetensors": b"c" * 5000,
            "pytorch_model.bin": b"p" * 5000,
            "onnx/config.json": b"{}",
            "onnx/model.onnx": b"o",
        }
    )


def test_only_the_files_that_are_needed_are_downloaded_and_only_once(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = small_repo()
    folder = Path(run_client(RESOLVE, {"name": "me/tiny"})["folder"])
    needed = {"config.json", "tokenizer.json", "merges.txt", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == needed
    assert (folder / "model.safetensors").read_bytes() == b"s" * 5000
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(hub.downloads())
    hub.log.clear()
    assert run_client(RESOLVE, {"name": "me/tiny"})["folder"] == str(folder)
    assert not needed & set(hub.downloads())


def test_a_cached_model_loads_with_the_hub_gone_or_switched_off(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = small_repo()
    online = run_client(RESOLVE, {"name": "me/tiny"})
    hub.log.clear()
    assert run_client(RESOLVE, {"name": "me/tiny"}, HF_HUB_OFFLINE="1") == online
    assert hub.log == []
    closed_port = "http://127.0.0.1:9"
    assert run_client(RESOLVE, {"name": "me/tiny"}, HF_ENDPOINT=closed_port) == online
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": closed_port}):
        error = run_client(RESOLVE, {"name": "me/other"}, **environment)["error"]
        assert "me/other is not in the local cache" in error and "LLM() without a name" in error


def test_sharded_weights_come_by_their_index_and_bin_files_only_for_want_of_safetensors(
    hub: Hub, run_client: RunClient
) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "other.safetensors"}}
    files = {"config.json": b"{}", "pytorch_model.bin": b"p", "unused.safetensors": b"u"}
    shards = {"model-00001-of-00002.safetensors": b"1", "other.safetensors": b"2"}
    hub.repos["me/sharded"] = Repo(
        files | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    )
    folder = Path(run_client(RESOLVE, {"name": "me/sharded"})["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *shards,
    }
    hub.repos["me/bin"] = Repo(files)
    folder = Path(run_client(RESOLVE, {"name": "me/bin"})["folder"])
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    folder = Path(run_client(RESOLVE, {"name": "me/sharded", "load_format": "pt"})["folder"])
    assert (folder / "pytorch_model.bin").exists()


def test_dummy_weights_and_tokenizers_need_the_small_files_only(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = small_repo()
    folder = Path(run_client(RESOLVE, {"name": "me/tiny", "load_format": "dummy"})["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "merges.txt",
    }


def test_every_file_comes_from_the_revision_that_was_found_first(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = small_repo()
    folder = Path(run_client(RESOLVE, {"name": "me/tiny", "revision": "main"})["folder"])
    assert folder.name == "1" * 40
    fetched = [path for method, path, _ in hub.log if "resolve" in path]
    assert fetched and all(f"/resolve/{'1' * 40}/" in path for path in fetched)
    error = run_client(RESOLVE, {"name": "me/tiny", "revision": "v9"})["error"]
    assert error == "me/tiny has no revision 'v9'"


LARGE = bytes(range(250)) * 48_000  # 12 MB: the client writes to the disk in pieces of 10 MiB
CUT = 11_000_000
RESUMED = f"bytes={10 * 1024**2}-"


def test_a_connection_that_breaks_is_taken_up_where_it_stopped(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = Repo({"config.json": b"{}", "model.safetensors": LARGE})
    hub.cut_after["model.safetensors"] = CUT
    folder = Path(run_client(RESOLVE, {"name": "me/tiny"})["folder"])
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert RESUMED in [requested for *_, requested in hub.log]


def test_a_download_that_fails_says_so_and_keeps_what_is_complete(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = Repo({"config.json": b"{}", "model.safetensors": LARGE})
    hub.cut_after["model.safetensors"] = CUT
    hub.refused.add("model.safetensors")
    error = run_client(RESOLVE, {"name": "me/tiny"})["error"]
    assert "downloading me/tiny failed" in error and "500" in error and "Run it again" in error
    hub.refused.clear()
    hub.log.clear()
    folder = Path(run_client(RESOLVE, {"name": "me/tiny"})["folder"])
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert "config.json" not in hub.downloads()  # it was complete


def test_a_repository_that_is_missing_private_or_gated_says_what_to_do(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/private"] = small_repo()
    hub.repos["me/private"].private = True
    hub.repos["me/gated"] = small_repo()
    hub.repos["me/gated"].gated = True
    for name in ("me/missing", "me/private"):
        error = run_client(RESOLVE, {"name": name})["error"]
        assert f"{name} is neither a local folder nor a repository" in error
        assert "hf_token=" in error
    error = run_client(RESOLVE, {"name": "me/gated"})["error"]
    assert "gated" in error and "accept its licence" in error and "hf_token=" in error
    for name in ("me/private", "me/gated"):
        assert "folder" in run_client(RESOLVE, {"name": name, "token": TOKEN})
    assert "not a valid repository name" in run_client(RESOLVE, {"name": "me/a--b"})["error"]


def test_a_file_of_another_size_than_announced_is_not_kept(hub: Hub, run_client: RunClient) -> None:
    repo = hub.repos["me/tiny"] = small_repo()
    repo.announced_sizes["model.safetensors"] = 6000
    error = run_client(RESOLVE, {"name": "me/tiny"})["error"]
    assert "downloading me/tiny failed" in error and "5000" in error and "6000" in error
    repo.announced_sizes.clear()
    folder = Path(run_client(RESOLVE, {"name": "me/tiny"})["folder"])
    assert (folder / "model.safetensors").read_bytes() == b"s" * 5000


def test_a_full_disk_is_a_typed_error_and_leaves_no_broken_file(
    hub: Hub, run_client: RunClient
) -> None:
    hub.repos["me/tiny"] = small_repo()
    hub.repos["me/tiny"].files["model.safetensors"] = b"s" * 300_000
    error = run_client(RESOLVE, {"name": "me/tiny"}, file_size_limit=100_000)["error"]
    assert "downloading me/tiny failed" in error and "File too large" in error
    folder = Path(run_client(RESOLVE, {"name": "me/tiny"})["folder"])
    assert (folder / "model.safetensors").read_bytes() == b"s" * 300_000


def test_an_index_that_lists_what_the_hub_does_not_have_is_refused(
    hub: Hub, run_client: RunClient
) -> None:
    for target, message in (("gone.safetensors", "not on the hub"), ("../x", "does not list")):
        index = json.dumps({"weight_map": {"a": target}}).encode()
        hub.repos["me/index"] = Repo({"config.json": b"{}", "model.safetensors.index.json": index})
        hub.repos["me/index"].sha = hashlib.sha1(index).hexdigest()
        assert message in run_client(RESOLVE, {"name": "me/index"})["error"]
    hub.repos["me/empty"] = Repo({"config.json": b"{}"})
    error = run_client(RESOLVE, {"name": "me/empty"})["error"]
    assert "no weights that nbllm can read" in error and "pytorch_model.bin" in error


LOAD = """
import json, sys
from nbllm import LLM, ModelLoadError
try:
    LLM(json.loads(sys.argv[1]), skip_tokenizer_init=True, device="cpu").close()
    print("{}")
except ModelLoadError as error:
    print(json.dumps({"error": str(error)}))
"""


def test_a_truncated_file_on_the_hub_is_named(
    hub: Hub, run_client: RunClient, make_checkpoint: Callable[..., Any]
) -> None:
    folder, _ = make_checkpoint("Llama")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repos["me/truncated"] = Repo(files)
    files["model.safetensors"] = files["model.safetensors"][:-1000]
    error = run_client(LOAD, "me/truncated")["error"]
    assert "model.safetensors" in error


# The quickstart of vLLM's documentation; the import, and what a test needs, is all that differs.
QUICKSTART = """
import json
from nbllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model="facebook/opt-125m")
outputs = llm.generate(prompts, sampling_params)
texts = []
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    num_tokens = len(output.outputs[0].token_ids)
    texts.append([prompt, generated_text, output.prompt_token_ids, num_tokens])
print()
print(json.dumps({"texts": texts, "dtype": llm.config.dtype}))
"""


def opt_125m(make_checkpoint: Callable[..., Any]) -> dict[str, bytes]:
    """The files of facebook/opt-125m, with a small model in them."""
    import io

    from tokenizers import ByteLevelBPETokenizer

    words = ["Hello, my name is", "The president of the United States is", "The capital of France"]
    bpe = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(words * 4, vocab_size=300, min_frequency=1, special_tokens=specials)
    folder, model = make_checkpoint(
        "OPT",
        ffn_dim=96,
        init_std=0.2,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", None) and "float16"
    tensors = {n.removeprefix("model."): t.half() for n, t in model.state_dict().items()}
    weights = io.BytesIO()
    torch.save(tensors, weights)
    merges, vocabulary = io.StringIO(), json.loads(bpe.to_str())["model"]
    for left, right in vocabulary["merges"]:
        merges.write(f"{left} {right}\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokenizer_config = {
        "errors": "replace",
        "add_prefix_space": False,
        "add_bos_token": True,
        "special_tokens_map_file": None,
        "name_or_path": "patrickvonplaten/opt-30b",
        "tokenizer_class": "GPT2Tokenizer",
    } | {
        name: {
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "__type": "AddedToken",
        }
        for name, text in special.items()
        if name != "pad_token"
    }
    documents = {
        "config.json": config,
        "vocab.json": vocabulary["vocab"],
        "special_tokens_map.json": special,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    }
    files = {name: json.dumps(content).encode() for name, content in documents.items()}
    return files | {
        "merges.txt": b"#version: 0.2\n" + merges.getvalue().encode(),
        "pytorch_model.bin": weights.getvalue(),
        "tf_model.h5": b"tensorflow",
        "flax_model.msgpack": b"jax",
    }


def test_the_quickstart_of_vllm_runs_with_the_import_changed(
    hub: Hub, run_client: RunClient, make_checkpoint: Callable[..., Any]
) -> None:
    hub.repos["facebook/opt-125m"] = Repo(opt_125m(make_checkpoint))
    result = run_client(QUICKSTART, None)
    assert not {"tf_model.h5", "flax_model.msgpack"} & set(hub.downloads())
    prompts = [prompt for prompt, *_ in result["texts"]]
    assert prompts[0] == "Hello, my name is" and len(prompts) == 4
    for _, text, prompt_token_ids, num_tokens in result["texts"]:
        assert isinstance(text, str) and num_tokens >= 1
        assert prompt_token_ids[0] == 2 and len(prompt_token_ids) > 2  # </s> opens every text


def test_a_local_folder_the_demo_and_a_wrong_path_need_no_hub(tmp_path: Path) -> None:
    assert resolve_model(None) == DEMO_FOLDER
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    for wrong in ("./nothing-here", "/nothing/here", "a/b/c", Path("nothing")):
        with pytest.raises(ModelLoadError, match="there is no folder"):
            resolve_model(wrong)


@pytest.mark.parametrize("variable", ["NBLLM_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"])
def test_modelscope_is_asked_for_by_a_true_word_and_must_be_installed(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)  # not there
    for word in ("1", "True", "YES", " on "):
        monkeypatch.setenv(variable, word)
        with pytest.raises(ModelLoadError, match="pip install modelscope"):
            resolve_model("me/tiny")
    for word in ("0", "false", "", "no"):
        monkeypatch.setenv(variable, word)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelLoadError) as info:
            resolve_model("me/not-there", cache_dir=shutil.os.devnull + "/x")
        assert "modelscope" not in str(info.value)
