"""What a DataFrame costs over bare token ids: rows/s, the engine's share of the time, memory.

    python examples/bench_dataframe.py --rows 100000                     # bundled model, CPU
    python examples/bench_dataframe.py --shape qwen3-0.6b --rows 10000 --template-tokens 512

The same rows go through `LLM.generate` as token ids and through `df.llm.generate` as text, by turns
in pieces of a tenth, with an empty prefix cache each time; texts must be equal. The last line is
JSON. The engine's share is the CPU time of its thread while the frame is answered, by the time that
passes: on a CPU, where that thread computes; the rest is templates, tokens, text and pandas, as far
as they are not in its shadow.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd

import nbllm
from nbllm import LLM, SamplingParams
from nbllm.bench.workloads import SHAPES, write_config

NUM_PIECES = 10
DEMO = Path(nbllm.__file__).parent / "demo"


def resident_mb() -> float | None:
    """Memory of this process, or None where the system does not say (it is not Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * 4096 / 1e6


def engine_seconds() -> float:
    """CPU time of the engine's thread so far."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return float("nan")
    idents = [t.ident for t in threading.enumerate() if t.name == "nbllm-engine"]
    return time.clock_gettime(time.pthread_getcpuclockid(idents[-1]))


def load(shape: str | None, folder: Path) -> LLM:
    """The bundled model; or one of that shape, with random weights and the bundled tokenizer."""
    if shape is None:
        return LLM(dtype="float32")
    write_config(shape, folder)
    for path in DEMO.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    return LLM(folder, load_format="dummy", max_model_len=4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--template-tokens", type=int, default=0, help="a beginning of all rows")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, load(options.shape, Path(folder)) as llm:
        params = SamplingParams(temperature=0, max_tokens=options.max_tokens, ignore_eos=True)
        beginning = "The weather is fine today. " * (options.template_tokens // 6)
        template = beginning + "What is {number} plus {other}?"
        seconds = {"ids": 0.0, "frame": 0.0}
        engine, is_equal, memory = 0.0, True, []
        size = options.rows // NUM_PIECES
        for piece in range(-1, NUM_PIECES):  # the first one warms up
            count = size if piece >= 0 else min(size, 512)
            numbers = range(piece * size, piece * size + count)
            frame = pd.DataFrame({"number": numbers, "other": [n % 97 for n in numbers]})
            texts = [template.format(number=n, other=n % 97) for n in numbers]
            encode = llm.get_tokenizer().encode
            ids = [{"prompt_token_ids": encode(text)} for text in texts]
            llm.reset_prefix_cache()
            begin = time.perf_counter()
            outputs = llm.generate(ids, params, use_tqdm=False)
            middle = time.perf_counter()
            llm.reset_prefix_cache()
            busy, start = engine_seconds(), time.perf_counter()
            answered = frame.llm.generate(
                template, params, llm=llm, chat=False, use_tqdm=False, dedupe=False
            )
            end = time.perf_counter()
            is_equal &= answered["llm"].tolist() == [o.outputs[0].text for o in outputs]
            if piece >= 0:
                engine += engine_seconds() - busy
                seconds["ids"] += middle - begin
                seconds["frame"] += end - start
                memory.append(resident_mb())
        result = {
            "rows": size * NUM_PIECES,
            "device": llm.config.device,
            "rows_per_s": {k: round(size * NUM_PIECES / s, 1) for k, s in seconds.items()},
            "frame_over_ids": round(seconds["frame"] / seconds["ids"], 3),
            "engine_share": round(engine / seconds["frame"], 3),
            "resident_mb": memory,
            "texts_equal": is_equal,
        }
    print(json.dumps(result))
    return 0 if is_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
