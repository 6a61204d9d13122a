"""Names of models become folders: the real client of the hub against a loopback server.

The client runs in other processes, since it reads its settings from the environment at import.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nbllm import LLM, ModelLoadError
from nbllm.hub import DEMO_FOLDER, resolve_model

WEIGHTS = "model.safetensors"
TOKEN = "hf_abcdefgh"
Resolve = Callable[..., dict[str, str]]

SMALL = {
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


def test_only_the_files_that_are_needed_are_downloaded_and_only_once(
    hub: Any, resolve: Resolve
) -> None:
    hub.add("me/tiny", SMALL)
    folder = Path(resolve("me/tiny")["folder"])
    needed = {"config.json", "tokenizer.json", "merges.txt", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == needed
    assert (folder / "model.safetensors").read_bytes() == b"s" * 5000
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(hub.downloads())
    hub.log.clear()
    assert resolve("me/tiny")["folder"] == str(folder)
    assert not needed & set(hub.downloads())
    assert len(hub.log) <= 2  # what the branch points to now, and no more


def test_a_cached_model_loads_with_the_hub_gone_or_switched_off(hub: Any, resolve: Resolve) -> None:
    hub.add("me/tiny", SMALL)
    online = resolve("me/tiny")
    hub.log.clear()
    assert resolve("me/tiny", environment={"HF_HUB_OFFLINE": "1"}) == online
    assert hub.log == []
    closed_port = "http://127.0.0.1:9"
    assert resolve("me/tiny", environment={"HF_ENDPOINT": closed_port}) == online
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": closed_port}):
        error = resolve("me/other", environment=environment)["error"]
        assert "me/other is not in the local cache" in error and "LLM() without a name" in error


def test_sharded_weights_come_by_their_index_and_bin_files_only_for_want_of_safetensors(
    hub: Any, resolve: Resolve
) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "other.safetensors"}}
    files = {"config.json": b"{}", "pytorch_model.bin": b"p", "unused.safetensors": b"u"}
    shards = {"model-00001-of-00002.safetensors": b"1", "other.safetensors": b"2"}
    hub.add(
        "me/sharded", files | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    )
    folder = Path(resolve("me/sharded")["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *shards,
    }
    hub.add("me/bin", files)
    folder = Path(resolve("me/bin")["folder"])
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    folder = Path(resolve("me/sharded", load_format="pt")["folder"])
    assert (folder / "pytorch_model.bin").exists()


def test_dummy_weights_and_tokenizers_need_the_small_files_only(hub: Any, resolve: Resolve) -> None:
    hub.add("me/tiny", SMALL)
    folder = Path(resolve("me/tiny", load_format="dummy")["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "merges.txt",
    }


def test_what_sentence_transformers_says_about_pooling_comes_with_the_model(
    hub: Any, resolve: Resolve
) -> None:
    about = {"modules.json": b"[]", "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}'}
    hub.add("me/embedder", SMALL | about)
    folder = Path(resolve("me/embedder")["folder"])
    assert (folder / "1_Pooling" / "config.json").exists() and not (folder / "onnx").exists()
    assert resolve("me/embedder", environment={"HF_HUB_OFFLINE": "1"})["folder"] == str(folder)


def test_every_file_comes_from_the_revision_that_was_found_first(
    hub: Any, resolve: Resolve
) -> None:
    hub.add("me/tiny", SMALL)
    folder = Path(resolve("me/tiny", revision="main")["folder"])
    assert folder.name == "1" * 40
    fetched = [path for method, path, _ in hub.log if "resolve" in path]
    assert fetched and all(f"/resolve/{'1' * 40}/" in path for path in fetched)
    error = resolve("me/tiny", revision="v9")["error"]
    assert error == "me/tiny has no revision 'v9'"


LARGE = bytes(range(250)) * 48_000  # 12 MB: the client writes to the disk in pieces of 10 MiB
CUT = 11_000_000
RESUMED = f"bytes={10 * 1024**2}-"


def test_a_connection_that_breaks_is_taken_up_where_it_stopped(hub: Any, resolve: Resolve) -> None:
    hub.add("me/tiny", {"config.json": b"{}", "model.safetensors": LARGE})
    hub.cut_after["model.safetensors"] = CUT
    answer = resolve("me/tiny")
    if "error" in answer:  # by huggingface_hub before 1.0, which resumes on the next call only
        assert "Run it again" in answer["error"]
        answer = resolve("me/tiny")
    folder = Path(answer["folder"])
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert RESUMED in [requested for *_, requested in hub.log]


def test_a_download_that_fails_says_so_and_keeps_what_is_complete(
    hub: Any, resolve: Resolve
) -> None:
    hub.add("me/tiny", {"config.json": b"{}", "model.safetensors": LARGE})
    hub.cut_after["model.safetensors"] = CUT
    hub.refused.add("model.safetensors")
    error = resolve("me/tiny")["error"]
    assert "downloading me/tiny failed" in error and "Run it again" in error
    hub.refused.clear()
    hub.log.clear()
    folder = Path(resolve("me/tiny")["folder"])
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert "config.json" not in hub.downloads()  # it was complete


def test_a_repository_that_is_missing_private_or_gated_says_what_to_do(
    hub: Any, resolve: Resolve
) -> None:
    hub.add("me/private", SMALL, private=True)
    hub.add("me/gated", SMALL, gated=True)
    for name in ("me/missing", "me/private"):
        error = resolve(name)["error"]
        assert f"{name} is neither a local folder nor a repository" in error
        assert "hf_token=" in error
    for token in (None, "hf_somebody_else"):  # 401 and 403
        error = resolve("me/gated", token=token)["error"]
        assert "gated" in error and "accept its licence" in error and "hf_token=" in error
    for name in ("me/private", "me/gated"):
        assert "folder" in resolve(name, token=TOKEN)
    assert "not a valid repository name" in resolve("me/a--b")["error"]


def test_a_file_of_another_size_than_announced_is_not_kept(hub: Any, resolve: Resolve) -> None:
    repo = hub.add("me/tiny", SMALL)
    repo.announced_sizes["model.safetensors"] = 6000
    error = resolve("me/tiny")["error"]
    assert "downloading me/tiny failed" in error and "5000" in error and "6000" in error
    repo.announced_sizes.clear()
    folder = Path(resolve("me/tiny")["folder"])
    assert (folder / "model.safetensors").read_bytes() == b"s" * 5000


def test_a_full_disk_is_a_typed_error_and_leaves_no_broken_file(hub: Any, resolve: Resolve) -> None:
    hub.add("me/tiny", SMALL | {"model.safetensors": b"s" * 300_000})
    error = resolve("me/tiny", file_size_limit=100_000)["error"]
    assert "downloading me/tiny failed" in error and "File too large" in error
    folder = Path(resolve("me/tiny")["folder"])
    assert (folder / "model.safetensors").read_bytes() == b"s" * 300_000


def test_an_index_that_lists_what_the_hub_does_not_have_is_refused(
    hub: Any, resolve: Resolve
) -> None:
    cases = (
        ("gone.safetensors", "not on the hub"),
        ("../x", "does not list"),
        ([], "does not list"),
    )
    for target, message in cases:
        index = json.dumps({"weight_map": {"a": target}}).encode()
        hub.add("me/index", {"config.json": b"{}", "model.safetensors.index.json": index})
        hub.repos["me/index"].sha = hashlib.sha1(index).hexdigest()
        assert message in resolve("me/index")["error"]
    hub.add("me/empty", {"config.json": b"{}"})
    error = resolve("me/empty")["error"]
    assert "no weights that nbllm can read" in error and "pytorch_model.bin" in error


def test_a_model_loads_from_the_cache_and_a_truncated_file_of_it_is_named(
    hub: Any, resolve: Resolve, make_checkpoint: Callable[..., Any]
) -> None:
    folder, _ = make_checkpoint("Llama")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("me/good", files)
    with LLM(resolve("me/good")["folder"], skip_tokenizer_init=True, device="cpu") as llm:
        assert llm.model_config.architecture == "LlamaForCausalLM"
    hub.add("me/truncated", files | {WEIGHTS: files[WEIGHTS][:-1000]})
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        LLM(resolve("me/truncated")["folder"], skip_tokenizer_init=True, device="cpu")


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


@pytest.mark.skipif(find_spec("modelscope") is None, reason="modelscope is not installed")
def test_modelscope_downloads_what_is_needed(hub: Any, resolve: Resolve) -> None:
    hub.add("me/tiny", SMALL)
    environment = {"VLLM_USE_MODELSCOPE": "True"}
    folder = Path(resolve("me/tiny", environment=environment)["folder"])
    needed = {"config.json", "tokenizer.json", "merges.txt", "model.safetensors"}
    assert needed <= {path.name for path in folder.iterdir()}
    assert not (folder / "pytorch_model.bin").exists() and not (folder / "onnx").exists()
    error = resolve("me/missing", environment=environment)["error"]
    assert "downloading me/missing from ModelScope failed" in error
