"""Kernels of nbllm: one file per op.

Tensors on a CUDA device go to Triton kernels, tensors on the CPU to PyTorch; `reference` holds the
plain form of every op. Nothing here knows of requests, schedulers or models.
"""

from nbllm_kernels.activation import gelu_and_mul, silu_and_mul
from nbllm_kernels.attention_inputs import HeadNorm, attention_inputs
from nbllm_kernels.attention_metadata import (
    AttentionMetadata,
    SharedPrefix,
    rows_per_prefix_tile,
)
from nbllm_kernels.cpu_threads import one_thread, release_threads
from nbllm_kernels.decode_state import (
    BAD_LOGITS,
    NUM_COLUMNS,
    DecodeInputs,
    DecodeState,
    append_tokens,
    decode_inputs,
    fill_last_tokens,
    start_rows,
)
from nbllm_kernels.linear import PackedWeight, Weight, linear, pack_weight
from nbllm_kernels.lm_head_sample import lm_head_sample
from nbllm_kernels.norm_linear import norm_gated_linear, norm_linear
from nbllm_kernels.paged_attention import paged_attention
from nbllm_kernels.penalties import (
    MAX_COUNT,
    PROMPT_FLAG,
    Penalties,
    apply_penalties,
    count_tokens,
)
from nbllm_kernels.rms_norm import rms_norm
from nbllm_kernels.rotary import rotary
from nbllm_kernels.sampling import SamplingTensors, gumbel_noise, sample
from nbllm_kernels.store_kv import store_kv

__all__ = [
    "BAD_LOGITS",
    "MAX_COUNT",
    "NUM_COLUMNS",
    "PROMPT_FLAG",
    "AttentionMetadata",
    "DecodeInputs",
    "DecodeState",
    "HeadNorm",
    "PackedWeight",
    "Penalties",
    "SamplingTensors",
    "SharedPrefix",
    "Weight",
    "append_tokens",
    "apply_penalties",
    "attention_inputs",
    "count_tokens",
    "decode_inputs",
    "fill_last_tokens",
    "gelu_and_mul",
    "gumbel_noise",
    "linear",
    "lm_head_sample",
    "norm_gated_linear",
    "norm_linear",
    "one_thread",
    "pack_weight",
    "paged_attention",
    "release_threads",
    "rms_norm",
    "rotary",
    "rows_per_prefix_tile",
    "sample",
    "silu_and_mul",
    "start_rows",
    "store_kv",
]
