"""Model folders made to break or to attack: each is refused with an error that names the file, and
the tensor where there is one; nothing in the folder is run, nothing outside of it is opened.

The file is a script, too: `python -O test_hostile_folders.py BASE WORK` runs every case where
`assert` does nothing, and prints the errors. It is long because it is a table of a hundred cases.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbllm import LLM, InvalidRequestError, ModelLoadError, SamplingParams

WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
CANARY = "NBLLM_HOSTILE_CODE_RAN"

Change = Callable[[Path], None]
CASES: dict[str, tuple[Change, tuple[str, ...]]] = {}  # name -> how to make it, words of the error


def case(*words: str) -> Callable[[Change], Change]:
    """Register a function that turns a good folder into a hostile one."""

    def register(change: Change) -> Change:
        CASES[change.__name__] = change, words
        return change

    return register


def config_case(name: str, *words: str, **values: Any) -> None:
    """A case that sets, or with None removes, entries of config.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | values
        content = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))

    CASES[name] = change, ("config.json", *words)


def text_case(name: str, file: str, content: bytes, *words: str) -> None:
    """A case that replaces a file."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(content)

    CASES[name] = change, (file, *words)


def tensor_case(name: str, *words: str, **changes: Callable[[torch.Tensor], Any]) -> None:
    """A case that changes tensors; `norm` stands for the last norm's weight, None drops it."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        changed = changes["norm"](tensors.pop(NORM))
        save_file(tensors if changed is None else tensors | {NORM: changed}, folder / WEIGHTS)

    CASES[name] = change, words


class Payload:
    """Unpickling it would run a program."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


# -- config.json ----------------------------------------------------------------------------------

EVIL_CODE = f"import os; os.environ['{CANARY}'] = '1'; open('{CANARY}', 'w').close()\n"
AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
ROPE = {"rope_theta": 1e4}


@case("config.json", "missing")
def config_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


@case("config.json", "not a file")
def config_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@case("config.json", "not a file")
def config_is_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case("config.json", "link")
def config_is_a_link_to_a_secret(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent / "secret")


@case("config.json", "EvilForCausalLM", "not supported")
def config_asks_for_code_of_its_own(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL_CODE)
    content = json.loads((folder / "config.json").read_text())
    content |= {"architectures": ["EvilForCausalLM"], "auto_map": AUTO_MAP, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(content))


text_case("config_is_empty", "config.json", b"")
text_case("config_is_no_json", "config.json", b"{'hidden_size': 64}")
text_case("config_is_a_list", "config.json", b"[1]", "object")
text_case("config_is_no_utf8", "config.json", b'{"a": "\xff\xfe"}')
text_case("config_is_nested_without_end", "config.json", b'{"a":' * 200_000)
text_case("config_has_an_endless_number", "config.json", b'{"a": ' + b"9" * 50_000 + b"}")
config_case("architectures_are_missing", "architecture", architectures=None)
config_case("architectures_are_no_list", "architecture", architectures={"a": "b"})
config_case("architectures_hold_no_text", "architecture", architectures=[["LlamaForCausalLM"]])
config_case("vocab_size_is_missing", "vocab_size", vocab_size=None)
config_case("vocab_size_is_wrong", WEIGHTS, "(512, 64)", "(500, 64)", vocab_size=500)
config_case("vocab_size_is_absurd", "vocab_size", vocab_size=2**40)
config_case("hidden_size_is_text", "hidden_size", hidden_size="64")
config_case("hidden_size_is_negative", "hidden_size", hidden_size=-64)
config_case("hidden_size_is_true", "hidden_size", hidden_size=True)
config_case("layers_are_absurd", "num_hidden_layers", num_hidden_layers=10**9)
config_case("positions_are_absurd", "max_position", max_position_embeddings=2**40)
config_case("model_is_larger_than_the_file", WEIGHTS, "bytes", hidden_size=2**14, head_dim=2**10)
config_case("heads_do_not_divide", "4 heads", num_key_value_heads=3)
config_case("head_dim_is_odd", "rotated", head_dim=15)
config_case("eps_is_not_a_number", "rms_norm_eps", rms_norm_eps=float("nan"))
config_case("activation_is_unknown", "hidden_act", hidden_act="os.system")
config_case("dtype_is_unknown", "dtype", dtype="load")
config_case("eos_is_outside_of_the_vocabulary", "eos_token_id", eos_token_id=512)
config_case("eos_is_text", "eos_token_id", eos_token_id="</s>")
config_case("weights_are_quantized", "quantization_config", quantization_config={"bits": 4})
config_case("rope_type_is_unknown", "rope_type", rope_parameters=ROPE | {"rope_type": "x"})
config_case("rope_is_a_list", rope_parameters=[1])
config_case("rope_theta_is_zero", "rope_theta", rope_parameters={"rope_theta": -1.0})
config_case("rope_factor_is_missing", "factor", rope_parameters=ROPE | {"rope_type": "linear"})
config_case(
    "rope_factors_are_too_few",
    "short_factor",
    rope_parameters=ROPE | {"rope_type": "longrope", "short_factor": [1.0], "long_factor": []},
)
config_case(
    "layer_types_are_too_few",
    "layer_types",
    architectures=["Qwen2ForCausalLM"],
    sliding_window=8,
    layer_types=["sliding_attention"],
)
config_case(
    "positions_of_layers_are_too_few",
    "no_rope_layers",
    architectures=["SmolLM3ForCausalLM"],
    no_rope_layers=[1],
)
text_case("generation_config_is_no_json", "generation_config.json", b"{")
text_case("generation_config_eos_is_wrong", "generation_config.json", b'{"eos_token_id": [-1]}')


# -- weights: safetensors -------------------------------------------------------------------------


def header_case(name: str, *words: str, **entry: Any) -> None:
    """A case that writes one tensor's entry of the safetensors header anew."""

    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        header[NORM] |= entry
        raw = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])

    CASES[name] = change, (WEIGHTS, *words)


@case("no weights", WEIGHTS, BIN)
def weights_are_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@case(WEIGHTS)
def weights_are_truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1000])


@case(WEIGHTS, "not a file")
def weights_are_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@case(WEIGHTS, "link")
def weights_are_a_link_to_the_outside(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "outside.safetensors")


@case(WEIGHTS, "norm.weight", "twice")
def a_tensor_is_there_with_and_without_its_prefix(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"norm.weight": tensors[NORM].clone()}, folder / WEIGHTS)


text_case("weights_are_empty", WEIGHTS, b"")
PADDING = b" " * 2_000_000
text_case("header_is_no_json", WEIGHTS, struct.pack("<Q", 4) + b"evil" + PADDING)
text_case("header_is_longer_than_the_file", WEIGHTS, struct.pack("<Q", 2**60) + PADDING)
header_case("offsets_overlap", data_offsets=[0, 256])
header_case("offsets_leave_the_file", data_offsets=[2**40, 2**40 + 256])
header_case("offsets_run_backwards", data_offsets=[256, 0])
header_case("shape_is_not_that_of_the_bytes", shape=[2**40])
header_case("shape_overflows", shape=[2**40, 2**40])
header_case("dtype_is_unknown_to_safetensors", dtype="EVIL")
tensor_case("tensor_is_missing", "missing norm.weight", norm=lambda t: None)
tensor_case("tensor_is_nan", WEIGHTS, NORM, "NaN", norm=lambda t: t * float("nan"))
tensor_case("tensor_is_infinite", WEIGHTS, NORM, "infinity", norm=lambda t: t / 0)
tensor_case("tensor_is_too_short", WEIGHTS, NORM, "(63,)", norm=lambda t: t[:63].clone())
tensor_case("tensor_has_too_many_axes", WEIGHTS, NORM, "(64, 1)", norm=lambda t: t[:, None])
tensor_case("tensor_is_of_integers", WEIGHTS, NORM, "int64", norm=lambda t: t.long())
tensor_case("tensor_is_of_bytes", WEIGHTS, NORM, "float8", norm=lambda t: t.to(torch.float8_e4m3fn))


@case("unexpected evil.weight", WEIGHTS)
def a_tensor_is_unexpected(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"evil.weight": torch.ones(2)}, folder / WEIGHTS)


# -- weights: shards ------------------------------------------------------------------------------


def index_case(name: str, weight_map: Any, *words: str) -> None:
    """A case whose weights are listed by an index."""

    def change(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder / "shard.safetensors")
        shutil.copy(folder / "shard.safetensors", folder.parent / "outside.safetensors")
        shutil.copy(folder / "shard.safetensors", folder / "copy.safetensors")
        (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
        mapped = weight_map(folder) if callable(weight_map) else weight_map
        (folder / INDEX).write_text(json.dumps({"weight_map": mapped}))

    CASES[name] = change, (INDEX, *words)


index_case("index_points_above", {"a": "../outside.safetensors"}, "not a plain file name")
index_case(
    "index_points_anywhere", lambda f: {"a": f"{f.parent}/outside.safetensors"}, "plain file name"
)
index_case("index_points_to_a_link", {"a": "link.safetensors"}, "link.safetensors", "link")
index_case("index_points_to_nothing", {"a": "gone.safetensors"}, "gone.safetensors is missing")
index_case("index_points_to_the_folder", {"a": ".."}, "not a plain file name")
index_case("index_has_a_null_byte", {"a": "shard\0.safetensors"}, "not a plain file name")
index_case("index_maps_to_a_list", {"a": ["shard.safetensors"]}, "weight_map")
index_case("index_is_empty", {}, "weight_map")
index_case("index_is_a_list", ["shard.safetensors"], "weight_map")
index_case("two_shards_hold_a_tensor", {"a": "shard.safetensors", "b": "copy.safetensors"})
CASES["two_shards_hold_a_tensor"] = (
    CASES["two_shards_hold_a_tensor"][0],
    ("shard.safetensors, tensor", "copy.safetensors too"),
)


@case(INDEX, "JSON")
def index_is_no_json(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text("{")


# -- weights: pickles -----------------------------------------------------------------------------


def bin_case(name: str, content: Callable[[dict[str, torch.Tensor]], Any], *words: str) -> None:
    """A case whose weights are a pytorch_model.bin."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(content(tensors), folder / BIN)

    CASES[name] = change, (BIN, *words)


bin_case("bin_runs_a_program", lambda t: t | {"evil": Payload()}, "not a file of plain tensors")
bin_case("bin_is_a_list", lambda t: list(t.values()), "list")
bin_case("bin_holds_text", lambda t: t | {NORM: "evil"}, NORM, "str")
bin_case("bin_holds_a_sparse_tensor", lambda t: t | {NORM: torch.eye(3).to_sparse()}, NORM, "dense")
bin_case("bin_holds_complex_numbers", lambda t: t | {NORM: t[NORM] * 1j}, NORM, "complex64")
bin_case("bin_holds_nan", lambda t: t | {NORM: t[NORM] * float("nan")}, NORM, "NaN")
bin_case("bin_has_another_shape", lambda t: t | {NORM: t[NORM][:5]}, NORM, "(5,)")
bin_case("bin_names_a_tensor_by_number", lambda t: t | {7: t[NORM]}, "7")
bin_case("bin_repeats_one_number", lambda t: t | {NORM: torch.ones(1).expand(2**40)}, NORM)


@case(BIN, "not a file of plain tensors")
def bin_is_a_bare_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(pickle.dumps(Payload()) + b" " * 2_000_000)


@case(BIN, "not a file of plain tensors")
def bin_is_truncated(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / BIN)
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:-30_000] + b"\0" * 29_000)


@case(BIN, "not a file of plain tensors")
def bin_is_a_program(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / BIN, "w") as archive:  # as TorchScript saves a module
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{name}", EVIL_CODE.ljust(100_000))
        archive.writestr("archive/version", "3\n")


# -- tokenizer ------------------------------------------------------------------------------------


@case("tokenizer.json", "missing")
def tokenizer_is_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@case("tokenizer.json", "link")
def tokenizer_is_a_link_to_the_outside(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder.parent / "outside.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "outside.json")


text_case("tokenizer_is_no_json", "tokenizer.json", b"{")
text_case("tokenizer_is_of_no_kind", "tokenizer.json", b'{"model": {"type": "Evil"}}')
text_case("tokenizer_config_is_no_json", "tokenizer_config.json", b"{")
text_case("tokenizer_config_is_a_list", "tokenizer_config.json", b"[]", "object")
text_case("special_tokens_are_no_json", "special_tokens_map.json", b"}")
text_case("chat_template_is_no_utf8", "chat_template.jinja", b"\xff\xfe")
text_case("template_list_is_broken", "tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}')
text_case("special_token_is_broken", "tokenizer_config.json", b'{"eos_token": {"text": "</s>"}}')


@case("tokenizer")
def tokenizer_asks_for_code_of_its_own(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "evil.py").write_text(EVIL_CODE)
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    content = {"tokenizer_class": "EvilTokenizer", "auto_map": auto_map}
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


SLOW = {"tokenizer_asks_for_code_of_its_own"}  # imports transformers, which takes seconds

# -- running them ---------------------------------------------------------------------------------

_events: list[str] | None = None  # what the hook records into, or None
_allowed: list[str] = []  # folders that may be opened


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _events is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith(tuple(_allowed)):
            _events.append(f"open {path}")
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        _events.append(f"{event} {args}")
    elif event == "exec" and "evil" in getattr(args[0], "co_filename", ""):
        _events.append(f"exec {args[0].co_filename}")
    elif event == "import" and "evil" in str(args[0]):
        _events.append(f"import {args[0]}")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Collect what is opened outside of the folder and of Python, run or imported."""
    global _events
    _allowed[:] = [os.path.realpath(folder), sys.prefix, sys.base_prefix, "/proc/", "/sys/"]
    _allowed.append(str(Path(torch.__file__).parent.parent))
    _allowed.append(str(Path(sys.modules["nbllm"].__file__ or "").parent.parent))
    _events = seen = []
    try:
        yield seen
    finally:
        _events = None


def attempt(name: str, base: Path, work: Path) -> tuple[str, str, list[str]]:
    """Make a case's folder and load it: class and text of the error, and what it did."""
    place = work / name
    folder = place / "model"
    shutil.copytree(base, folder)
    (place / "secret").write_text("{}")
    CASES[name][0](folder)
    kind, text = "", ""
    with watched(folder) as events:
        try:
            LLM(folder, device="cpu").close()
        except Exception as error:  # whatever it is: the caller compares
            kind, text = type(error).__name__, str(error)
    if CANARY in os.environ or list(work.rglob(CANARY)) or Path(CANARY).exists():
        events.append("the folder's code ran")
    shutil.rmtree(place)
    return kind, text, events


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder, with a tokenizer."""
    from tokenizers import Tokenizer, models

    source, _ = make_checkpoint("Llama")
    folder = tmp_path_factory.mktemp("hostile") / "base"
    shutil.copytree(source, folder)
    vocabulary = {chr(i): i - 32 for i in range(32, 127)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    tempfile.gettempdir()  # tries once whether it can write
    sys.addaudithook(_audit)
    with watched(folder) as events:
        LLM(folder, device="cpu").close()  # the folder is good, and everything is imported
    assert events == []
    return folder


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder_is_refused_by_name_and_nothing_runs(
    base: Path, tmp_path: Path, name: str
) -> None:
    threads = threading.active_count()
    kind, text, events = attempt(name, base, tmp_path)
    assert kind == "ModelLoadError", text
    assert events == []
    for word in CASES[name][1]:
        assert word in text
    assert threading.active_count() == threads


def test_nothing_of_a_refused_model_stays_in_memory(base: Path, tmp_path: Path) -> None:
    from nbllm.models import CausalLM

    shutil.copytree(base, tmp_path / "model")
    CASES["tensor_is_nan"][0](tmp_path / "model")
    with pytest.raises(ModelLoadError):
        LLM(tmp_path / "model", device="cpu")
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, CausalLM)]


def test_a_known_architecture_with_an_auto_map_loads_without_its_code(
    base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "evil.py").write_text(EVIL_CODE)
    content = json.loads((folder / "config.json").read_text()) | {"auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(content))
    with watched(folder) as events:
        LLM(folder, device="cpu").close()
    assert events == [] and CANARY not in os.environ


def test_a_tokenizer_with_ids_that_the_model_lacks_fails_only_the_texts_that_use_them(
    base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["~"] = 600
    (folder / "tokenizer.json").write_text(json.dumps(content))
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(folder, device="cpu") as llm:
        with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
            good, bad = llm.generate(["abc", "a~c"], params, use_tqdm=False)
        assert len(good.outputs[0].token_ids) == 4
        assert isinstance(bad.error, InvalidRequestError) and "600" in str(bad.error)


def test_all_of_it_holds_without_assert_statements(base: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-O", __file__, str(base), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert set(outcomes) == set(CASES) - SLOW
    for name, (kind, text, events) in outcomes.items():
        assert (kind, events) == ("ModelLoadError", []), f"{name}: {text}"
        assert all(word in text for word in CASES[name][1]), f"{name}: {text}"


if __name__ == "__main__":
    sys.addaudithook(_audit)
    base_folder, work_folder = Path(sys.argv[1]), Path(sys.argv[2])
    LLM(base_folder, device="cpu").close()
    gc.freeze()  # every load collects: not the imported modules each time
    names = [name for name in CASES if name not in SLOW]
    print(json.dumps({name: attempt(name, base_folder, work_folder) for name in names}))
