"""close() gives the memory back, also after an exception."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A model of 300 MB (in float32) and a cache of 200 MB, in a process of its own: its memory is ours
# alone.
CHECK = """
import gc, json, sys
from pathlib import Path
import torch
from nbllm import LLM, SamplingParams

folder, device, dtype, scenario = sys.argv[1:]

def used():
    if device == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def make(folder):
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, device=device,
              dtype=dtype, kv_cache_memory_bytes=200 << 20, max_num_batched_tokens=64)
    llm.generate(prompts, params, use_tqdm=False)
    return llm

params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
prompts = [list(range(2, 60))] * 40
# Libraries keep buffers of their own from the first use on, in each of the threads that live at a
# time: not counted. So they are used first just as they will be.
tiny = make(folder + "/tiny")
if scenario == "rerun":
    tiny = make(folder + "/tiny")
tiny.close()
before = used()
llm = make(folder)
during = used()
assert during - before > 200e6, f"only {(during - before) / 1e6:.0f} MB in use"
kept = None
if scenario == "exception":
    def broken(*_):
        weights = [p for p in llm._thread._engine.runner.model.parameters()]
        raise RuntimeError("injected")
    llm._thread.call(lambda engine: setattr(engine.runner.model.layers[1], "forward", broken))
    kept = llm.generate([prompts[0]] , params, use_tqdm=False)[0].error
    assert kept.__cause__.__traceback__ is not None  # which holds frames, and so tensors
    llm.close()
elif scenario == "rerun":
    llm = make(folder)  # the first one goes
    again = used()
    assert again - during < 50e6, f"{(again - during) / 1e6:.0f} MB more after running it again"
    llm.close()
else:
    llm.close()
gc.collect()
left = used() - before
assert left < 50e6, f"{left / 1e6:.0f} MB are not given back"
"""

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    tiny = CONFIG | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(tiny), encoding="utf-8")
    return folder


def check(folder: Path, *arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, str(folder), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("scenario", ["close", "exception", "rerun"])
def test_memory_comes_back_on_the_cpu(folder: Path, scenario: str) -> None:
    check(folder, "cpu", "float32", scenario)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scenario", ["close", "exception", "rerun"])
def test_memory_comes_back_on_the_gpu(folder: Path, dtype: str, scenario: str) -> None:
    check(folder, "cuda", dtype, scenario)
