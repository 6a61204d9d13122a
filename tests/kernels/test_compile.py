"""Kernels compile ahead of time for Hopper (sm_90), on a machine without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here"),
    # Of Triton 3.7 itself, on Python 3.13.
    pytest.mark.filterwarnings("ignore:AnnAssign.__init__ missing:DeprecationWarning"),
]

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> Any:
    """Compile for sm_90; pointers and strides are aligned, as a model's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes: dict[tuple[int], list[list[Any]]] = {}
    signature: dict[str, str] = {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if name.endswith("_ptr") or name in ("stride_q_token", "stride_x_row", "stride_weight_row"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"enable_fp_fusion": True} | options  # as all launches say
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_attention(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    *,
    is_decode: bool,
    cache_dtype: torch.dtype | None = None,
    merges: bool = False,
) -> Any:
    import triton

    from nbllm_kernels.gpu.attention_kernel import paged_attention_kernel
    from nbllm_kernels.gpu.decode_attention import decode_shape
    from nbllm_kernels.gpu.decode_attention_kernel import decode_attention_kernel
    from nbllm_kernels.gpu.paged_attention import chunk_shape

    shape = (decode_shape if is_decode else chunk_shape)(dtype, head_dim, group)
    constants: dict[str, Any] = {
        "STRIDE_Q_HEAD": head_dim,
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "PAGE_SIZE": 64,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "HAS_WINDOW": False,
        "HAS_SOFTCAP": False,
        "PRECISION": "ieee",
    }
    kernel = paged_attention_kernel
    if is_decode:
        kernel = decode_attention_kernel
        constants |= {"IS_SPLIT": not merges, "MERGES": merges, "HAS_PREFIX": merges}
        constants["LAUNCH_PDL"] = True
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in ("k_ptr", "v_ptr"):
            types[name] = f"*{TYPES[cache_dtype or dtype]}"
        elif name in ("q_ptr", "out_ptr", "prefix_out_ptr"):
            types[name] = f"*{TYPES[dtype]}"
        elif name in ("lse_ptr", "prefix_lse_ptr"):
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = "*i32"
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
    options: dict[str, Any] = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    return compile_kernel(kernel, types, constants, **options)


def compile_prefix(dtype: torch.dtype, head_dim: int, group: int) -> Any:
    import triton

    from nbllm_kernels.attention_metadata import rows_per_prefix_tile
    from nbllm_kernels.gpu.decode_attention import decode_shape
    from nbllm_kernels.gpu.prefix_attention_kernel import prefix_attention_kernel as kernel

    shape = decode_shape(dtype, head_dim, group)
    rows = rows_per_prefix_tile(8 * group, 8)
    constants: dict[str, Any] = {
        "STRIDE_Q_HEAD": head_dim,
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "PAGE_SIZE": 64,
        "ROWS": rows,
        "BLOCK_M": max(16, triton.next_power_of_2(rows * group)),
        "BLOCK_N": shape.block_n,
        "HAS_SOFTCAP": False,
        "PRECISION": "ieee",
        "LAUNCH_PDL": True,
    }
    types = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32", "scale_out": "fp32"}
    tensors = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    types |= dict.fromkeys(tensors, f"*{TYPES[dtype]}") | {"lse_ptr": "*fp32"}
    types |= dict.fromkeys(("prefix_lens_ptr", "tile_rows_ptr", "block_tables_ptr"), "*i32")
    options: dict[str, Any] = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    return compile_kernel(kernel, types, constants, launch_pdl=True, **options)


def compile_skinny(
    num_rows: int, out_features: int, in_features: int, activation: str, has_norm: bool
) -> Any:
    from nbllm_kernels.gpu.skinny_kernels import gemv_kernel, skinny_matmul_kernel
    from nbllm_kernels.gpu.skinny_linear import GemvShape, launch_shape

    shape = launch_shape(num_rows, out_features, in_features, 132, has_norm=has_norm)
    constants: dict[str, Any] = {
        "IN_FEATURES": in_features,
        "OUT_FEATURES": out_features,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "HAS_NORM": has_norm,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": activation == "none",
        "ACTIVATION": activation,
        "TRIGGER_EARLY": False,
        "LAUNCH_PDL": True,
    }
    options: dict[str, Any] = {"num_warps": shape.num_warps, "launch_pdl": True}
    kernel = gemv_kernel if isinstance(shape, GemvShape) else skinny_matmul_kernel
    if isinstance(shape, GemvShape):
        constants |= {"ROWS": num_rows, "CHUNKS": shape.chunks}
        constants["NUM_GROUPS"] = -(-in_features // (shape.block_k * shape.chunks))
    else:
        constants |= {"BLOCK_M": 16, "SLICES": shape.slices, "NORM_FACTOR": 1.0}
        constants["PREFETCH_LINES"] = shape.prefetch_lines
        options["num_stages"] = shape.num_stages
    types = dict.fromkeys(kernel.arg_names, "i32") | {"eps": "fp32", "weight_offset": "fp32"}
    types |= {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    return compile_kernel(kernel, types, constants, **options)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of memory that a thread uses in place of registers."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "-res-usage", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", result.stdout))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "is_decode"),
    [
        (torch.bfloat16, 64, 7, False),
        (torch.bfloat16, 128, 2, False),
        (torch.bfloat16, 128, 2, True),
        (torch.bfloat16, 80, 1, True),
        (torch.float32, 64, 2, False),
        (torch.float32, 128, 2, True),
    ],
)
def test_attention_compiles_for_hopper_without_spills(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    is_decode: bool,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_attention(dtype, head_dim, group, is_decode=is_decode)
    ptx = kernel.asm["ptx"]
    if dtype == torch.bfloat16 and not is_decode:
        assert "wgmma.mma_async" in ptx
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("group", [2, 4])
def test_a_prefix_is_merged_for_hopper_without_spills(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_dtype: torch.dtype | None,
    group: int,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    options = {"is_decode": True, "cache_dtype": cache_dtype, "merges": True}
    kernel = compile_attention(torch.bfloat16, 128, group, **options)
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float32, 128), (torch.float32, 256)]
)
def test_attention_to_a_prefix_compiles_for_hopper_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int
) -> None:
    # A stack costs more than time: the driver keeps it for all threads that fit on the device.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_prefix(dtype, head_dim, 2)
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize(("head_dim", "is_decode"), [(64, True), (128, True), (128, False)])
def test_attention_to_float8_compiles_for_hopper_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_dim: int, is_decode: bool
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_attention(
        torch.bfloat16, head_dim, 2, is_decode=is_decode, cache_dtype=torch.float8_e4m3fn
    )
    assert "cvt.rn.f16x2.e4m3x2" in kernel.asm["ptx"]  # two numbers at a time
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize(
    ("out_features", "in_features", "activation", "has_norm"),
    [
        (4096, 1024, "none", True),
        (6144, 1024, "silu", True),
        (1024, 3072, "none", False),
        (16384, 2048, "silu", True),
        (6144, 4096, "none", True),
        (28672, 4096, "silu", True),
        (10240, 5120, "none", True),
        (4096, 4096, "none", False),
        (4096, 14336, "none", False),
    ],
)
def test_skinny_products_compile_for_hopper_without_spills(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    out_features: int,
    in_features: int,
    activation: str,
    has_norm: bool,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_skinny(num_rows, out_features, in_features, activation, has_norm)
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
    before, after = kernel.asm["ptx"].split("griddepcontrol.wait", 1)
    weights = re.findall(r"ld\.global[.\w:]*v4|prefetch\.global", before)
    assert weights  # requested while the kernel before still runs
    assert "st.global" not in before
    assert "mma" in after or num_rows < 16


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("in_features", [1024, 4096])
def test_the_head_and_its_draw_compile_for_hopper_without_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, in_features: int
) -> None:
    from nbllm_kernels.gpu import lm_head_sample as head
    from nbllm_kernels.gpu.skinny_linear import GemvShape

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    shape = head.head_shape(num_rows, 151_936, in_features, 132)
    constants: dict[str, Any] = {
        "IN_FEATURES": in_features,
        "VOCAB_SIZE": 151_936,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "LAUNCH_PDL": True,
    }
    options: dict[str, Any] = {"num_warps": shape.num_warps, "launch_pdl": True}
    if isinstance(shape, GemvShape):
        kernel = head.lm_head_gemv_kernel
        num_groups = -(-in_features // (shape.block_k * shape.chunks))
        constants |= {"CHUNKS": shape.chunks, "NUM_GROUPS": num_groups}
    else:
        kernel = head.lm_head_matmul_kernel
        constants["BLOCK_M"] = 16
        options["num_stages"] = shape.num_stages
    types = dict.fromkeys(kernel.arg_names, "i32") | {"id_ptr": "*i32", "value_ptr": "*fp32"}
    types |= {"x_ptr": "*bf16", "weight_ptr": "*bf16", "temperature_ptr": "*fp32"}
    types |= {"seeds_ptr": "*i64", "positions_ptr": "*i64"}
    compiled = compile_kernel(kernel, types, constants, **options)
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize(
    ("name", "types", "constants"),
    [
        (
            "decode_state._start_rows_kernel",
            {"temperature_ptr": "*fp32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}
            | dict.fromkeys(
                ("num_tokens_ptr", "max_tokens_ptr", "top_k_ptr", "is_active_ptr"), "*i32"
            ),
            {
                "NUM_COLUMNS": 9,
                "NUM_STOP_IDS": 8,
                "PADDED_STOP_IDS": 8,
                "RING": 8,
                "PADDED_RING": 8,
            },
        ),
        ("decode_state._fill_last_tokens_kernel", {"num_tokens": "i32"}, {"TOKENS": 1024}),
        (
            "penalties._apply_penalties_kernel",
            {"logits_ptr": "*bf16", "occurrences_ptr": "*i16", "stride_logits": "i32"}
            | dict.fromkeys(
                ("presence_ptr", "frequency_ptr", "repetition_ptr", "out_ptr"), "*fp32"
            ),
            {"VOCAB_SIZE": 151936, "BLOCK": 4096},
        ),
        (
            "bounded_draw.bound_kernel",
            {"logits_ptr": "*bf16", "stride_row": "i32"}
            | dict.fromkeys(("temperature_ptr", "bound_ptr"), "*fp32"),
            {"VOCAB_SIZE": 151936, "BLOCK": 2048, "HAS_FILTER": False},
        ),
        (
            "bounded_draw.settle_kernel",
            {"logits_ptr": "*bf16", "stride_row": "i32"}
            | dict.fromkeys(("temperature_ptr", "bound_ptr"), "*fp32")
            | dict.fromkeys(("sure_ptr", "tied_ptr", "limit_ptr"), "*i32"),
            {"VOCAB_SIZE": 151936, "BLOCK": 2048, "NUM_TILES": 75, "PADDED_TILES": 128}
            | {"HAS_FILTER": True},
        ),
        (
            "threshold_kernel.threshold_kernel",
            {"logits_ptr": "*bf16", "stride_row": "i32", "is_left_ptr": "*i32"}
            | dict.fromkeys(("temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32")
            | dict.fromkeys(("top_k_ptr", "sure_ptr", "tied_ptr", "limit_ptr"), "*i32"),
            {"VOCAB_SIZE": 151936, "BLOCK": 2048},
        ),
        (
            "shortlist_kernel.shortlist_kernel",
            {"logits_ptr": "*bf16", "stride_row": "i32", "value_ptr": "*fp32"}
            | dict.fromkeys(("temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32")
            | dict.fromkeys(("top_k_ptr", "sure_ptr", "tied_ptr", "limit_ptr"), "*i32")
            | dict.fromkeys(("is_left_ptr", "id_ptr"), "*i32"),
            {"VOCAB_SIZE": 151936, "BLOCK": 2048, "CAPACITY": 4096},
        ),
        ("penalties._count_tokens_kernel", {"occurrences_ptr": "*i16"}, {"VOCAB_SIZE": 151936}),
    ],
)
def test_kernels_of_tables_compile_for_hopper(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    types: dict[str, str],
    constants: dict[str, Any],
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    module, kernel_name = name.split(".")
    kernel = getattr(importlib.import_module(f"nbllm_kernels.gpu.{module}"), kernel_name)
    all_types = dict.fromkeys(kernel.arg_names, "*i64") | types
    cubin = compile_kernel(kernel, all_types, constants, num_warps=16).asm["cubin"]
    assert stack_bytes(cubin, tmp_path) == 0
