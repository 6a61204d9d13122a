"""Speed of every kernel against the card's own ceilings, each checked in the same run.

    python kernels/benchmarks/bench_kernels.py

Shapes are those of Qwen3-0.6B in bfloat16. Ceilings: a copy of 1 GiB (bytes read and written) and
an 8192^3 bfloat16 product. Every op is compared with the reference first; a wrong result ends the
run. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from nbllm_kernels import AttentionMetadata, Penalties, SamplingTensors, reference
from nbllm_kernels.gpu.activation import silu_and_mul
from nbllm_kernels.gpu.matmul import matmul_batch_invariant
from nbllm_kernels.gpu.paged_attention import paged_attention
from nbllm_kernels.gpu.penalties import apply_penalties
from nbllm_kernels.gpu.rms_norm import rms_norm
from nbllm_kernels.gpu.rotary import rotary
from nbllm_kernels.gpu.sampling import sample
from nbllm_kernels.gpu.store_kv import store_kv

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB, PAGE = 16, 8, 128, 1024, 3072, 151_936, 64
SCALE = HEAD_DIM**-0.5
results: list[dict[str, Any]] = []


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def measure(
    name: str,
    run: Callable[[], Any],
    check: Callable[[], Any] | None,
    num_bytes: int,
    flop: int = 0,
) -> None:
    """Check, time, and print one row.

    The median; the L2 cache is flushed before each run; launches from Python count.
    """
    if check is not None:
        torch.testing.assert_close(run(), check(), rtol=2e-2, atol=2e-2)
    ms = float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))
    row = {
        "op": name,
        "us": round(ms * 1e3, 1),
        "gb_per_s": round(num_bytes / ms / 1e6),
        "tflop_per_s": round(flop / ms / 1e9, 1),
    }
    results.append(row)
    print(row)


def attention(num_seqs: int, query_len: int, seq_len: int, *, fp8: bool = False) -> None:
    pages = seq_len // PAGE
    tables = torch.randperm(num_seqs * pages, device="cuda").int().view(num_seqs, pages)
    shape = (num_seqs * pages, KV_HEADS, PAGE, HEAD_DIM)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    keys, values = random(*shape).to(dtype), random(*shape).to(dtype)
    query = random(num_seqs * query_len, HEADS, HEAD_DIM)
    starts = torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * query_len
    metadata = AttentionMetadata(
        query_start_loc=starts,
        seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32, device="cuda"),
        block_tables=tables,
        slot_mapping=torch.zeros(len(query), dtype=torch.int64, device="cuda"),
        max_query_len=query_len,
        max_seq_len=seq_len,
        num_decode_seqs=num_seqs if query_len == 1 else 0,
    )
    visible = query_len * seq_len - query_len * (query_len - 1) // 2
    measure(
        f"paged_attention {num_seqs} x {query_len} of {seq_len}{', fp8' if fp8 else ''}",
        lambda: paged_attention(query, keys, values, metadata, scale=SCALE),
        lambda: reference.paged_attention(query, keys, values, metadata, scale=SCALE),
        2 * keys.nbytes + 2 * query.nbytes,
        4 * num_seqs * visible * HEADS * HEAD_DIM,
    )


def small_ops(num_tokens: int) -> None:
    x, residual, weight = random(num_tokens, HIDDEN), random(num_tokens, HIDDEN), random(HIDDEN)
    measure(
        f"rms_norm + residual, {num_tokens} rows",
        lambda: rms_norm(x, weight, 1e-6, residual=residual),
        lambda: reference.rms_norm(x, weight, 1e-6, residual=residual),
        4 * x.nbytes,
    )
    gate_up = random(num_tokens, 2 * INNER)
    measure(
        f"silu_and_mul, {num_tokens} rows",
        lambda: silu_and_mul(gate_up),
        lambda: reference.silu_and_mul(gate_up),
        gate_up.nbytes * 3 // 2,
    )
    query, key = random(num_tokens, HEADS, HEAD_DIM), random(num_tokens, KV_HEADS, HEAD_DIM)
    table = random(4096, HEAD_DIM, dtype=torch.float32)
    positions = torch.arange(num_tokens, device="cuda") % 4096
    measure(
        f"rotary, {num_tokens} tokens",
        lambda: rotary(query, key, table, positions),
        lambda: reference.rotary(query, key, table, positions),
        2 * (query.nbytes + key.nbytes),
    )
    cache = torch.zeros(
        2, num_tokens // PAGE + 1, KV_HEADS, PAGE, HEAD_DIM, device="cuda", dtype=torch.bfloat16
    )
    slots = torch.randperm(num_tokens, device="cuda")
    expected = torch.zeros_like(cache)
    reference.store_kv(key, key, expected[0], expected[1], slots)
    store_kv(key, key, cache[0], cache[1], slots)
    assert torch.equal(cache, expected)
    measure(
        f"store_kv, {num_tokens} tokens",
        lambda: store_kv(key, key, cache[0], cache[1], slots),
        None,
        4 * key.nbytes,
    )


def sampling(num_rows: int) -> None:
    logits = random(num_rows, VOCAB, dtype=torch.float32) * 3
    penalties = Penalties(
        occurrences=torch.zeros(num_rows, VOCAB, dtype=torch.int16, device="cuda"),
        presence=torch.full((num_rows,), 0.5, device="cuda"),
        frequency=torch.zeros(num_rows, device="cuda"),
        repetition=torch.full((num_rows,), 1.1, device="cuda"),
    )
    penalties.occurrences[:, ::100] = 2
    rows = torch.arange(num_rows, device="cuda")
    measure(
        f"apply_penalties, {num_rows} rows",
        lambda: apply_penalties(logits, rows, penalties),
        lambda: reference.apply_penalties(logits, rows, penalties),
        2 * logits.nbytes + penalties.occurrences.nbytes,
    )
    for name, temperature, top_p in (
        ("greedy", 0.0, 1.0),
        ("plain", 0.8, 1.0),
        ("top_p", 0.8, 0.9),
    ):
        params = SamplingTensors(
            temperature=torch.full((num_rows,), temperature, device="cuda"),
            top_k=torch.zeros(num_rows, dtype=torch.int32, device="cuda"),
            top_p=torch.full((num_rows,), top_p, device="cuda"),
            min_p=torch.zeros(num_rows, device="cuda"),
            seeds=torch.arange(num_rows, device="cuda"),
            positions=torch.arange(num_rows, device="cuda"),
            all_greedy=temperature == 0.0,
            any_filter=top_p < 1.0,
        )
        same = sample(logits, params) == reference.sample(logits, params)
        assert same.float().mean() > 0.98, name
        measure(
            f"sample {name}, {num_rows} rows",
            lambda params=params: sample(logits, params),
            None,
            logits.nbytes,
        )


def ceilings() -> None:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    measure("copy, the ceiling", lambda: target.copy_(source), None, 2 << 30)
    a, b = random(8192, 8192), random(8192, 8192)
    measure("matmul, the ceiling", lambda: a @ b, None, 3 * a.nbytes, 2 * 8192**3)


def main() -> None:
    torch.manual_seed(0)
    ceilings()
    for num_seqs, query_len, seq_len in ((1, 1, 512), (1, 1, 4096), (256, 1, 1024)):
        attention(num_seqs, query_len, seq_len)
        attention(num_seqs, query_len, seq_len, fp8=True)
    for num_seqs, query_len, seq_len in ((16, 1024, 1024), (4, 512, 4096)):
        attention(num_seqs, query_len, seq_len)
    small_ops(16_384)
    for num_rows in (1, 256):
        sampling(num_rows)
    weight = random(2 * INNER, HIDDEN)
    for num_rows in (16, 4096):
        x = random(num_rows, HIDDEN) / 32
        measure(
            f"matmul_batch_invariant, {num_rows} rows",
            lambda x=x: matmul_batch_invariant(x, weight),
            lambda x=x: x @ weight.T,
            weight.nbytes + x.nbytes + num_rows * 4 * INNER,
            4 * num_rows * HIDDEN * INNER,
        )
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps({"device": torch.cuda.get_device_name(), **versions, "results": results}))


if __name__ == "__main__":
    main()
