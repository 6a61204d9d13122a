"""How long a cell waits for its first token while a DataFrame of many rows is answered.

    python examples/bench_beside_frame.py                                   # bundled model, CPU
    python examples/bench_beside_frame.py --shape qwen3-0.6b --rows 20000   # that shape, on the GPU

One engine serves both. A question is asked again and again, first alone, then while the frame runs
(more rows than the batch holds, `--max-tokens` each), and its text must be the same. The last line
is JSON: first-token latencies in milliseconds, and rows/s of the frame with and without questions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
from bench_dataframe import load

from nbllm import LLM, SamplingParams

ASKED = "What is the capital of France?"


def ask(llm: LLM) -> tuple[float, str]:
    """Seconds to the first token, and the text."""
    start, first, text = time.perf_counter(), 0.0, ""
    for output in llm.stream(ASKED, SamplingParams(temperature=0.0, max_tokens=8)):
        first = first or time.perf_counter() - start
        text = output.outputs[0].text
    return first, text


def latencies(times: list[float]) -> dict[str, float]:
    """Median and worst in milliseconds."""
    return {"p50": round(1e3 * statistics.median(times), 1), "max": round(1e3 * max(times), 1)}


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", help="of the model; default: the bundled one")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two questions")
    options = parser.parse_args()
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
    frame = pd.DataFrame({"q": [f"Tell me story number {n}." for n in range(options.rows)]})
    with tempfile.TemporaryDirectory() as folder, load(options.shape, Path(folder)) as llm:
        _, expected = ask(llm)
        alone = [ask(llm)[0] for _ in range(options.questions)]
        beside, rates = [], {}
        for kind in ("without", "with"):
            job = frame.llm.submit("q", params, llm=llm, use_tqdm=False)
            while kind == "with" and not job.done():
                first, text = ask(llm)
                beside.append(first)
                assert text == expected, text
                time.sleep(options.pause)
            job.result()
            rates[kind] = round(job.stats.rows_per_s, 1)
        result = {
            "first_token_ms": {"alone": latencies(alone), "beside": latencies(beside)},
            "questions_beside": len(beside),
            "rows_per_s": rates,
            "max_num_seqs": llm.config.max_num_seqs,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
