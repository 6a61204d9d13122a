"""The attention kernel compiles ahead of time for Hopper (sm_90), on a machine without a GPU."""

from __future__ import annotations

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
]

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compile_attention(dtype: torch.dtype, head_dim: int, group: int, *, is_decode: bool) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nbllm_kernels.gpu.attention_kernel import paged_attention_kernel
    from nbllm_kernels.gpu.paged_attention import launch_shape

    shape = launch_shape(is_decode=is_decode, dtype=dtype, head_dim=head_dim, group=group)
    constants = {
        "STRIDE_Q_HEAD": head_dim,
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "PAGE_SIZE": 64,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "IS_DECODE": is_decode,
        "HAS_SPLITS": is_decode,
        "HAS_PREFIX": False,
        "HAS_WINDOW": False,
        "HAS_SOFTCAP": False,
        "PRECISION": "ieee",
    }
    types: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(paged_attention_kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
            types[name] = f"*{TYPES[dtype]}"
        elif name in ("partial_ptr", "max_ptr", "sum_ptr"):
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = "*i32"
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
        if name.endswith("_ptr") or name == "stride_q_token":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(paged_attention_kernel, types, constants, attributes)
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


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
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernel = compile_attention(dtype, head_dim, group, is_decode=is_decode)
    ptx = kernel.asm["ptx"]
    if dtype == torch.bfloat16 and not is_decode:
        assert "wgmma.mma_async" in ptx
    assert kernel.metadata.shared <= 227 * 1024
    assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
