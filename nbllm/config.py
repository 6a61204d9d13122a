"""EngineConfig: what the user chose. ModelConfig: what the checkpoint says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nbllm.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of the engine, under vLLM's names. `None` means: chosen from the device and model.

    Raises:
        InvalidRequestError: a value is out of its range; `.parameter` names it.
    """

    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    dtype: str = "auto"  # "auto", "float32", "float16", "bfloat16"
    kv_cache_dtype: str = "auto"  # the model's, or "fp8": half the memory, three bits of mantissa
    max_model_len: int | None = None  # tokens of prompt and output together
    max_num_seqs: int | None = None  # requests running at once
    max_num_batched_tokens: int | None = None  # tokens in one step
    block_size: int | None = None  # tokens in one KV-cache block
    gpu_memory_utilization: float = 0.9  # share of the *free* GPU memory to use
    kv_cache_memory_bytes: int | None = None  # exact size of the KV cache, overrides the share
    num_gpu_blocks_override: int | None = None  # exact number of blocks (for tests)
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"  # "fcfs" or "priority" (lower value first)
    batch_invariant: bool = False  # bitwise the same result in any batch, slower
    enforce_eager: bool = False  # no CUDA graphs
    seed: int = 0  # seeds the requests that bring no seed of their own
    max_logprobs: int = 20  # bound on `logprobs`; -1 is the vocabulary
    tensor_parallel_size: int = 1  # GPUs to spread the model over; only 1 so far

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From keyword arguments of `LLM`.

        Raises:
            TypeError: there is no such option; names the nearest one.
            InvalidRequestError: a value is out of its range.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidRequestError(
                    f"{name} must be a positive integer, got {value!r}", parameter=name
                )
        if self.block_size is not None and self.block_size not in (8, 16, 32, 64, 128, 256):
            raise InvalidRequestError(
                f"block_size must be 8, 16, 32, 64, 128 or 256, got {self.block_size!r}",
                parameter="block_size",
            )
        if self.kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3"):
            raise InvalidRequestError(
                f"kv_cache_dtype must be 'auto', 'fp8' or 'fp8_e4m3', got {self.kv_cache_dtype!r}",
                parameter="kv_cache_dtype",
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise InvalidRequestError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}",
                parameter="gpu_memory_utilization",
            )
        if self.tensor_parallel_size != 1:
            raise InvalidRequestError(
                f"tensor_parallel_size must be 1, got {self.tensor_parallel_size!r}",
                parameter="tensor_parallel_size",
            )
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise InvalidRequestError(
                f"scheduling_policy must be 'fcfs' or 'priority', got {self.scheduling_policy!r}",
                parameter="scheduling_policy",
            )
        if self.dtype not in ("auto", "float32", "float16", "bfloat16", "float", "half"):
            raise InvalidRequestError(
                f"dtype must be 'auto', 'float32', 'float16' or 'bfloat16', got {self.dtype!r}",
                parameter="dtype",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    Attributes:
        rope_type: "default", "linear", "dynamic", "llama3", "yarn" or "longrope".
        theta: base of the frequencies.
        rotary_dim: how many dimensions of a head rotate.
        max_position_embeddings: of the model.
        original_max_position_embeddings: what the model was first trained with.
        parameters: the rope_scaling dict of config.json, as it is.
    """

    rope_type: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    parameters: dict[str, Any]

    @property
    def depends_on_length(self) -> bool:
        """True if a longer text is rotated otherwise; `nbllm.models.rope` says how."""
        return self.rope_type in ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and kind of a model, from its config.json.

    The dense decoder family (Llama and everybody after) is one structure; the fields below
    `-- decoder` say where its members differ. Models of another structure read `raw`.

    Raises (from_folder, from_dict):
        ModelLoadError: the file is missing, no JSON, or says nothing that nbllm understands.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    dtype: str
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    hidden_act: str
    generation_config: dict[str, Any]  # generation_config.json: recommended sampling
    raw: dict[str, Any]  # config.json
    # -- decoder
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head" (Qwen 3, Gemma 3) or "full" (OLMo 2)
    norm_placement: str = "pre"  # "pre", "post" (OLMo 2) or "both" (Gemma 2 and 3)
    norm_offset: float = 0.0  # Gemma stores weight - 1
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # default head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    layer_windows: tuple[int | None, ...] = ()  # sliding window per layer
    layer_ropes: tuple[RopeConfig | None, ...] = ()  # None: the layer has no positions
    # -- encoder
    is_encoder: bool = False  # reads whole texts, in both directions, and generates none
    position_offset: int = 0  # the first positions that XLM-RoBERTa leaves to padding
    # -- embeddings
    pooling: str = "last"  # what `PoolingParams` leaves open
    normalize: bool = True
    max_seq_length: int | None = None  # tokens of a text, as sentence-transformers cuts it

    @property
    def output_size(self) -> int:
        """Width of the hidden states that the head sees; some OPT have narrower ones there."""
        return int(self.raw.get("word_embed_proj_dim") or self.hidden_size)

    @property
    def max_context_len(self) -> int:
        """Tokens of prompt and output that the model can take.

        As in vLLM: the configuration's positions, times what its rotary embedding stretches them
        by, unless they are the stretched length already. Encoders take what sentence-transformers
        gives them.
        """
        if self.is_encoder:
            num_positions = self.max_position_embeddings - self.position_offset
            return min(num_positions, self.max_seq_length or num_positions)
        stretched = [self.max_position_embeddings]
        for rope in self.layer_ropes:
            if rope is not None and rope.rope_type in ("linear", "dynamic", "yarn"):
                factor = float(rope.parameters.get("factor") or 1.0)
                stretched.append(int(rope.original_max_position_embeddings * factor))
        # Gemma 3 states the stretched length, and stretches only the layers without a window.
        is_gemma = self.architecture == "Gemma3ForCausalLM"
        return self.max_position_embeddings if is_gemma else max(stretched)

    @property
    def length_rope(self) -> RopeConfig | None:
        """The rotary embedding that depends on the length of the text, if there is one."""
        ropes = (rope for rope in self.layer_ropes if rope is not None and rope.depends_on_length)
        return next(ropes, None)

    def rope_cache_salt(self, text_len: int) -> int:
        """Texts with equal salts may share cached keys: their tokens are rotated alike.

        Args:
            text_len: of the prompt, or of the text that is computed again as a whole.
        """
        rope = self.length_rope
        if rope is None or text_len <= rope.original_max_position_embeddings:
            return 0
        return text_len if rope.rope_type == "dynamic" else 1

    def rope_restart_len(self, num_prompt_tokens: int) -> int | None:
        """The length at which a growing text must be computed again from its start, or None."""
        rope = self.length_rope
        if rope is None or rope.rope_type != "longrope":
            return None
        restart_len = rope.original_max_position_embeddings + 1
        return restart_len if num_prompt_tokens < restart_len else None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read config.json, and generation_config.json if it is there."""
        from nbllm.model_config import read_model_config

        return read_model_config(folder)
