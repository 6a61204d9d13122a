"""Decode steps of few rows: every kernel against float64 and the ceilings, layers and whole steps.

    python kernels/benchmarks/bench_decode_layer.py [--sweep] [--models qwen3-0.6b ...]

All times are of CUDA graphs, medians, weights and caches rotated so that none is read from the L2
cache. First, processes side by side compile what the run needs. `--sweep` times the candidates of
the launch tables, too. A short table comes last.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from typing import Any

import torch
import torch.nn.functional as F
from decode_model import EPS, SPECS, DecodeModel, Spec
from torch import Tensor

from nbllm_kernels import linear, rms_norm, sample, silu_and_mul
from nbllm_kernels.gpu.programmatic_launch import without_programmatic_launch
from nbllm_kernels.gpu.skinny_linear import (
    GemvShape,
    LaunchShape,
    MatmulShape,
    Norm,
    launch_shape,
    skinny_linear,
)

ROWS = (1, 4, 16)
CONTEXT = 512
NUM_PROCESSES = 14
NUM_PARTS = 3  # of the candidates of a product, compiled side by side
lines: list[str] = []  # of the table


def report(line: str) -> None:
    lines.append(line)
    print(line, flush=True)


def graph_us(run: Callable[[], Any], repeats: int = 20, per: int = 1) -> float:
    """Microseconds of a captured graph's replay, divided by `per`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times) / per


def ceilings() -> float:
    """GB/s of reading."""
    source = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    read = source.nbytes / graph_us(source.sum, 10) / 1e3
    half = source[: 1 << 28]
    copy = 2 * half.nbytes / graph_us(lambda: source[-len(half) :].copy_(half), 10) / 1e3
    tiny = torch.zeros(32, device="cuda")
    launch = graph_us(lambda: [tiny.add_(1) for _ in range(100)], per=100)
    report(f"read {read:.0f} GB/s, copy {copy:.0f} GB/s, a tiny kernel {launch:.2f} us")
    return read


class Product:
    """One of a layer's products with its prologue and epilogue, over rotating weights."""

    def __init__(self, spec: Spec, name: str, num_rows: int) -> None:
        self.out_features, self.in_features = spec.products[name]
        self.num_rows = num_rows
        self.has_norm = name in ("qkv", "gate_up")
        self.has_residual = name in ("o", "down")
        self.activation: Any = "silu" if name == "gate_up" else "none"
        size = 2 * self.out_features * self.in_features
        self.count = max(3, min(28, (512 << 20) // size))
        shape = (self.count, self.out_features, self.in_features)
        self.weights = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.weights /= self.in_features**0.5
        self.x = torch.randn(num_rows, self.in_features, device="cuda").bfloat16() * 3
        self.norm = torch.rand(self.in_features, device="cuda").bfloat16()
        self.residual = torch.randn(num_rows, self.out_features, device="cuda").bfloat16()
        self.bytes = size

    def fused(self, i: int, shape: LaunchShape | None = None) -> Tensor:
        return skinny_linear(
            self.x,
            self.weights[i],
            norm=Norm(self.norm, EPS) if self.has_norm else None,
            residual=self.residual if self.has_residual else None,
            activation=self.activation,
            shape=shape,
        )

    def composed(self, i: int) -> Tensor:
        x = rms_norm(self.x, self.norm, EPS) if self.has_norm else self.x
        if self.has_residual:
            return self.residual.addmm_(x, self.weights[i].t())
        y = F.linear(x, self.weights[i])
        return silu_and_mul(y) if self.activation == "silu" else y

    def error(self, shape: LaunchShape | None = None) -> float:
        """Relative, against float64."""
        x = self.x.double()
        if self.has_norm:
            x = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * self.norm.double()
        y = x @ self.weights[0].double().T
        if self.has_residual:
            y += self.residual.double()
        if self.activation == "silu":
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        kept = self.residual.clone()
        actual = self.fused(0, shape).double()
        self.residual.copy_(kept)
        return float((actual - y).norm() / y.norm())

    def us(self, run: Callable[[int], Tensor]) -> float:
        return graph_us(lambda: [run(i) for i in range(self.count)], per=self.count)


def candidates(product: Product) -> Iterator[LaunchShape]:
    """Launch sizes worth a measurement."""
    n, k, rows = product.out_features, product.in_features, product.num_rows
    if rows <= 4:
        for block_n, block_k, warps in itertools.product(
            (4, 8, 16, 32), (256, 512, 1024), (4, 8, 16)
        ):
            chunks = 1
            while chunks * block_k < k:
                chunks *= 2
            for step in {chunks, min(chunks, 8), min(chunks, 4)}:
                registers = block_n * block_k * step // (64 * warps)  # of a thread, for weights
                if (rows == 1 or step == chunks) and 16 <= registers <= 80 and n // block_n >= 64:
                    yield GemvShape(block_n, block_k, step, warps)
    if rows > 1 or k > 4096:
        for block_n, (block_k, slices, warps), stages in itertools.product(
            (16, 32, 64, 128),
            ((64, 4, 4), (128, 1, 4), (128, 1, 8), (256, 1, 4), (128, 4, 4), (64, 8, 8)),
            (4, 5, 7),
        ):
            tile_bytes = 2 * block_k * slices * (block_n + 16) * stages
            if tile_bytes <= 200_000 and n // block_n >= 32 and not (slices > 1 and block_n >= 64):
                yield MatmulShape(block_n, block_k, slices, warps, stages, 16)
    if rows > 1:
        for prefetch in (0, 64):
            base = launch_shape(16, n, k, 132)
            assert isinstance(base, MatmulShape)
            sizes = (base.block_n, base.block_k, base.slices, base.num_warps, base.num_stages)
            yield MatmulShape(*sizes, prefetch)


def products(names: list[str]) -> list[tuple[str, str, int]]:
    return list(itertools.product(names, ("qkv", "o", "gate_up", "down"), ROWS))


def compile_ahead(task: tuple[str, str, int], sweep: bool, part: int) -> None:
    """In a process of its own: fills Triton's cache on disk with a part of the candidates."""
    name, kind, num_rows = task
    if kind == "step":
        model = DecodeModel(SPECS[name], num_rows, CONTEXT, 1)
        model.step()
        with without_programmatic_launch():
            model.step()
        model.step(fused=False)
    else:
        product = Product(SPECS[name], kind, num_rows)
        product.fused(0)
        for shape in list(candidates(product))[part::NUM_PARTS] if sweep else ():
            try:
                product.fused(0, shape)
            except Exception as error:  # too much shared memory, or a tile that does not compile
                print(f"{task} {shape}: {type(error).__name__} {error}"[:200], flush=True)
    torch.cuda.synchronize()


def measure_products(names: list[str], read: float, sweep: bool) -> None:
    report("product              rows  error   us     of read  cuBLAS us")
    for name, kind, num_rows in products(names):
        product = Product(SPECS[name], kind, num_rows)
        us, composed = product.us(product.fused), product.us(product.composed)
        share = product.bytes / us / 1e3 / read
        report(
            f"{name + ' ' + kind:22}{num_rows:3}  {product.error():.1e}  {us:6.2f}  {share:6.1%}"
            f"  {composed:6.2f}"
        )
        if sweep:
            print_best(product)


def print_best(product: Product) -> None:
    """The fastest candidates, each checked."""
    timed = []
    for shape in dict.fromkeys(candidates(product)):
        try:
            us = product.us(lambda i, shape=shape: product.fused(i, shape))
        except Exception:  # reported when it was compiled
            continue
        timed.append((us, shape))
    timed.sort(key=lambda item: item[0])
    for us, shape in timed:
        print(f"      {us:6.2f} {astuple(shape)} {type(shape).__name__}", flush=True)
    for us, shape in timed[:3]:
        kind = "gemv" if isinstance(shape, GemvShape) else "matmul"
        lines.append(f"   {us:6.2f} {kind} {astuple(shape)} {product.error(shape):.1e}")


def measure_steps(names: list[str], read: float) -> None:
    report("step                 rows  PDL us  plain us  cuBLAS us  floor us  layer us")
    for name, num_rows in itertools.product(names, ROWS):
        spec = SPECS[name]
        model = DecodeModel(spec, num_rows, CONTEXT, spec.layers)
        kv_bytes = 4 * num_rows * CONTEXT * spec.kv_heads * spec.head_dim
        floor = (spec.layers * (spec.layer_bytes + kv_bytes) + 2 * model.head.numel()) / read / 1e3
        times = []
        for fused, programmatic in ((True, True), (True, False), (False, False)):
            model.reset()
            if programmatic:
                times.append(graph_us(lambda model=model: model.step()))
                hidden = model.embedding[model.tokens]
                layers = graph_us(lambda m=model, h=hidden: run_layers(m, h), per=spec.layers)
            else:
                with without_programmatic_launch():
                    times.append(graph_us(lambda m=model, fused=fused: m.step(fused=fused)))
        report(
            f"{name:22}{num_rows:3}  {times[0]:7.1f}  {times[1]:7.1f}  {times[2]:7.1f}"
            f"  {floor:7.1f}  {layers:7.2f}"
        )
        del model
        torch.cuda.empty_cache()


def measure_heads(names: list[str], read: float) -> None:
    """The head and the draw in one, with the logits stored, and through cuBLAS."""
    report("head and draw        rows  fused us  of read  stored us  cuBLAS us  same tokens")
    for name, num_rows in itertools.product(names, ROWS):
        model = DecodeModel(SPECS[name], num_rows, CONTEXT, 1)
        hidden, head, params = model.hidden.normal_(), model.head, model.sampling
        fused = graph_us(lambda m=model, h=hidden: m.draw(h, fused=True))
        stored = graph_us(lambda h=hidden, w=head, p=params: sample(linear(h, w), p))
        cublas = graph_us(lambda m=model, h=hidden: m.draw(h, fused=False))
        same = int((model.draw(hidden, fused=True) == sample(linear(hidden, head), params)).sum())
        report(
            f"{name:22}{num_rows:3}  {fused:8.1f}  {head.nbytes / fused / 1e3 / read:7.1%}"
            f"  {stored:9.1f}  {cublas:9.1f}  {same} of {num_rows}"
        )
        del model, hidden, head, params
        torch.cuda.empty_cache()


def run_layers(model: DecodeModel, hidden: Tensor) -> None:
    for layer in model.layers:
        model.run_layer(layer, hidden, fused=True)


def rollout(model: DecodeModel, num_steps: int) -> tuple[list[Tensor], torch.cuda.CUDAGraph]:
    """Capture a step; the first replays' results."""
    model.reset()
    model.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    return replay(model, graph, num_steps), graph


def replay(model: DecodeModel, graph: torch.cuda.CUDAGraph, num_steps: int) -> list[Tensor]:
    """All tokens, the last hidden state and every key and value of one text."""
    model.reset()
    tokens = torch.empty(num_steps, len(model.tokens), dtype=torch.int64, device="cuda")
    for i in range(num_steps):
        graph.replay()
        tokens[i].copy_(model.tokens)
    caches = [layer.kv_cache.clone() for layer in model.layers]
    return [tokens, model.hidden.clone(), *caches]


def check_identity(names: list[str]) -> None:
    """Programmatic launches give the same bits, in repeated texts of 32 steps."""
    for name, num_rows in itertools.product(names, ROWS):
        spec = SPECS[name]
        model = DecodeModel(spec, num_rows, 200, min(spec.layers, 16))
        with without_programmatic_launch():
            expected, _ = rollout(model, 32)
        first, graph = rollout(model, 32)
        texts = [first] + [replay(model, graph, 32) for _ in range(9)]
        equal = sum(all(map(torch.equal, text, expected)) for text in texts)
        finite = bool(torch.isfinite(expected[1]).all())
        report(f"{name} {num_rows} rows: {equal} of {len(texts)} texts equal, finite {finite}")
        del model
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(SPECS), choices=list(SPECS))
    options = parser.parse_args()
    started = time.monotonic()
    tasks = list(itertools.product(options.models, ("step",), ROWS)) + products(options.models)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        parts = range(NUM_PARTS if options.sweep else 1)
        jobs = [(task, options.sweep, part) for part in parts for task in tasks]
        list(pool.map(compile_ahead, *zip(*jobs, strict=True)))
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    read = ceilings()
    check_identity(options.models[:2])
    measure_steps(options.models, read)
    measure_heads(options.models, read)
    measure_products(options.models, read, options.sweep)
    print(f"\n{torch.cuda.get_device_name()}, {time.monotonic() - started:.0f} s")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
