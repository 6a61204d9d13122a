"""llama.cpp as a peer, through llama-cpp-python: the checkpoint is written as GGUF and run.

GGUF's specification: github.com/ggml-org/ggml, docs/gguf.md. Nothing is quantized: matrices keep
their bfloat16, vectors become float32, as llama.cpp's own converter does.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbllm.config import ModelConfig
from nbllm.models.weights import iterate_weights

if TYPE_CHECKING:
    from nbllm.bench.workloads import Workload

_PREFILL_TOKENS = 512  # per call, llama.cpp's own default of a micro-batch


class LlamaCppPeer:
    """A model of the Qwen 3 family in llama.cpp, on the CPU, in bfloat16.

    Args:
        folder: holds config.json and weights.
        device, dtype: of the engine that it is compared with: "cpu" and "bfloat16".

    Raises:
        ValueError: another device, dtype or architecture.
        ImportError: llama-cpp-python or gguf is missing.
    """

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise ImportError(
                "the peer llama.cpp needs: pip install llama-cpp-python gguf"
            ) from error
        if (device, dtype) != ("cpu", "bfloat16"):
            raise ValueError(
                f"the peer llama.cpp runs in bfloat16 on the CPU, not {dtype}, {device}"
            )
        self._lib: Any = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        self._silent = silent  # the library keeps a bare pointer to it
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            write_gguf(folder, path)
            parameters = llama_cpp.llama_model_default_params()
            parameters.use_mmap = False  # the file goes
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp can't load {folder}")
        self._vocab_size = ModelConfig.from_folder(folder).vocab_size

    def generate(self, workload: Workload) -> list[list[int]]:
        """See `Peer.generate`."""
        lib = self._lib
        num_rows, output_len = len(workload.prompts), workload.output_lens[0]
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = num_rows * (len(workload.prompts[0]) + output_len + 1)
        parameters.n_batch = parameters.n_ubatch = max(_PREFILL_TOKENS, num_rows)
        parameters.n_seq_max = num_rows
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        parameters.kv_unified = True
        context = lib.llama_init_from_model(self._model, parameters)
        batch = lib.llama_batch_init(parameters.n_batch, 0, 1)
        try:
            return self._generate(context, batch, workload)
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)

    def _generate(self, context: Any, batch: Any, workload: Workload) -> list[list[int]]:
        prompt_len, output_len = len(workload.prompts[0]), workload.output_lens[0]
        entries = [
            (row, position, token, position == prompt_len - 1)
            for row, prompt in enumerate(workload.prompts)
            for position, token in enumerate(prompt)
        ]
        tokens: list[list[int]] = [[] for _ in workload.prompts]
        for first in range(0, len(entries), _PREFILL_TOKENS):
            self._decode(context, batch, entries[first : first + _PREFILL_TOKENS], tokens)
        for position in range(prompt_len, prompt_len + output_len - 1):
            step = [(row, position, text[-1], True) for row, text in enumerate(tokens)]
            self._decode(context, batch, step, tokens)
        return tokens

    def _decode(
        self,
        context: Any,
        batch: Any,
        entries: list[tuple[int, int, int, bool]],
        tokens: list[list[int]],
    ) -> None:
        """One call; entries are (row, position, token, whether to choose the next one)."""
        batch.n_tokens = len(entries)
        for i, (row, position, token, wants_next) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = wants_next
        status = self._lib.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for i, (row, _, _, wants_next) in enumerate(entries):
            if wants_next:
                logits = self._lib.llama_get_logits_ith(context, i)
                scores = np.ctypeslib.as_array(logits, shape=(self._vocab_size,))
                tokens[row].append(int(scores.argmax()))


def write_gguf(folder: Path, path: Path) -> None:
    """Write a Qwen 3 checkpoint as GGUF, without a vocabulary.

    Raises:
        ValueError: another architecture.
    """
    import gguf

    config = ModelConfig.from_folder(folder)
    if config.architecture != "Qwen3ForCausalLM":
        raise ValueError(f"only Qwen 3 is written for llama.cpp, not {config.architecture}")
    rope = config.layer_ropes[0]
    assert rope is not None
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_layers)
    for weight in iterate_weights(folder):
        name = names.get_name(weight.name, try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"GGUF has no name for {weight.name}")
        if weight.tensor.ndim == 1:
            writer.add_tensor(name, weight.tensor.float().numpy())
        else:
            data = weight.tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
