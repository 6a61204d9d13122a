"""The shape of the code: who may import whom, what is banned, how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in (ROOT / "nbllm", ROOT / "kernels" / "nbllm_kernels")
    for path in folder.rglob("*.py")
)

LEAVES = {
    "errors",
    "checks",
    "interruptible",
    "sampling_params",
    "pooling_params",
    "outputs",
    "histogram",
    "config",
    "model_config",
    "config_numbers",
    "rope_config",
    "pooling_files",
}
FACES = {"dataframe", "server", "widgets", "magics", "cli", "bench", "dask", "ray"}
NO_TORCH = {
    *LEAVES,
    "detokenizer",
    "stop_strings",
    "tokenizer",
    "chat_template",
    "template_sandbox",
    "progress",
    "engine.request",
    "engine.block_manager",
    "engine.scheduler",
}
ONLY_IN = {  # package -> where it may be imported
    "fastapi": ("nbllm.server", "nbllm.bench.fastapi_peer"),
    "starlette": ("nbllm.server",),
    "uvicorn": ("nbllm.server", "nbllm.bench.fastapi_peer"),
    "prometheus_client": ("nbllm.server",),
    "pandas": (
        "nbllm.dataframe",
        "nbllm.cli",  # the demo shows a frame
        "nbllm.server.request_log",  # Server.requests()
    ),
    "anywidget": ("nbllm.widgets",),
    "ipywidgets": ("nbllm.widgets",),
    "traitlets": ("nbllm.widgets",),
    "jinja2": ("nbllm.chat_template", "nbllm.template_sandbox", "nbllm.dataframe.prompts"),
    "pyarrow": ("nbllm.dataframe",),
    "tokenizers": ("nbllm.tokenizer", "nbllm.prefix_encoder"),
    "triton": ("nbllm_kernels",),
}
MAX_LINES = 360  # about 350, that is
LONGER = {"nbllm/llm.py": 450}  # one method for each thing that users call


def module_name(path: Path) -> str:
    parts = list(path.with_suffix("").relative_to(ROOT).parts)
    if parts[0] == "kernels":
        parts = parts[1:]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top of the file); `if TYPE_CHECKING:` does not count."""
    tree = parse(path)
    top = set()
    hidden: set[ast.AST] = set()
    for node in tree.body:
        top.add(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            yield module, node in top
            if module in ("nbllm", "nbllm.engine", "nbllm.models", "nbllm_kernels"):
                for alias in node.names:
                    yield f"{module}.{alias.name}", node in top


def layer(module: str) -> int:
    """Lower layers never import higher ones."""
    if module.startswith("nbllm_kernels"):
        return 1
    parts = module.split(".")[1:]
    if not parts:
        return 9  # nbllm itself: lazy names for everybody, imported by nobody inside
    if parts[0] in LEAVES:
        return 0
    if parts[0] == "models":
        return 2
    if parts[0] == "engine":
        return 3
    if parts[0] in FACES:
        return 6
    return 5 if parts[0] in ("llm", "default_llm") else 4  # the pieces of llm


def test_imports_point_downwards() -> None:
    for path in FILES:
        module = module_name(path)
        own = layer(module)
        for name, _ in imports(path):
            if name.split(".")[0] not in ("nbllm", "nbllm_kernels"):
                continue
            if module == "nbllm" or name in ("nbllm.__version__", "nbllm"):
                continue
            if module.split(".")[-1] in ("model_files",) or name == "nbllm.model_files":
                continue  # reads files with care, for all layers
            if module == "nbllm.llm" and name == "nbllm.server.serve":
                continue  # llm.serve(), imported when it is called
            assert layer(name) <= own, f"{module} imports {name}"


def test_faces_know_neither_the_engine_nor_each_other() -> None:
    for path in FILES:
        parts = module_name(path).split(".")
        if len(parts) < 2 or parts[1] not in FACES:
            continue
        for name, _ in imports(path):
            is_timed = parts[1:] == ["bench", "server_process"]  # a token's way out of the engine
            assert is_timed or not name.startswith("nbllm.engine"), f"{parts} imports {name}"
            other = name.split(".")[1] if name.startswith("nbllm.") else ""
            if parts[1] in ("dask", "ray") and other == "dataframe":  # its verbs, on many machines
                continue
            if parts[1] not in ("cli", "bench") and other in FACES:  # the shell offers them all
                assert other == parts[1], f"{parts} imports {name}"


def test_kernels_know_torch_and_triton_only() -> None:
    for path in FILES:
        module = module_name(path)
        if not module.startswith("nbllm_kernels"):
            continue
        for name, _ in imports(path):
            assert not name.startswith("nbllm."), f"{module} imports {name}"
            assert name.split(".")[0] not in ("transformers", "numpy", "pandas", "nbllm")


def test_some_packages_belong_to_one_place() -> None:
    for path in FILES:
        module = module_name(path)
        for name, _ in imports(path):
            places = ONLY_IN.get(name.split(".")[0])
            assert places is None or module.startswith(places), f"{module} imports {name}"


def test_what_needs_no_torch_does_not_import_it() -> None:
    for path in FILES:
        module = module_name(path)
        if module.removeprefix("nbllm.") in NO_TORCH:
            for name, _ in imports(path):
                assert name.split(".")[0] not in ("torch", "nbllm_kernels"), f"{module}: {name}"


def test_slow_packages_are_imported_when_they_are_needed() -> None:
    for path in FILES:
        slow = ("transformers", "huggingface_hub", "pandas", "IPython", "tqdm", "modelscope")
        for name, is_top in imports(path):
            package = name.split(".")[0]
            if package == "pandas" and module_name(path).startswith("nbllm.dataframe"):
                continue
            assert not (is_top and package in slow), f"{path}: {name}"


def test_nothing_is_evaluated_or_unpickled() -> None:
    for path in FILES:
        banned_modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "nest_asyncio"}
        for name, _ in imports(path):
            assert name.split(".")[0] not in banned_modules, f"{path}: {name}"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                function = node.func
                if isinstance(function, ast.Name):
                    assert function.id not in ("eval", "exec", "compile", "print", "__import__")
                if isinstance(function, ast.Attribute) and function.attr == "load":
                    if isinstance(function.value, ast.Name) and function.value.id == "torch":
                        safe = {k.arg: k.value for k in node.keywords}.get("weights_only")
                        assert isinstance(safe, ast.Constant) and safe.value is True, path
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert isinstance(keyword.value, ast.Constant) and not keyword.value.value


def test_a_file_can_be_read_in_one_sitting() -> None:
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= LONGER.get(name, MAX_LINES), f"{name}: {num_lines} lines"


def test_a_file_has_a_name_that_says_something() -> None:
    for path in FILES:
        assert path.stem not in ("utils", "util", "helpers", "common", "base", "misc")


def test_the_kernels_folder_is_no_package() -> None:
    # Else it would shadow the package `kernels` of Hugging Face.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 40
