"""Tiny random checkpoints, written by transformers, which is also the reference."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The models are tiny: a second thread costs more than it brings. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

settings.register_profile("deterministic", derandomize=True)
settings.load_profile("deterministic")

gc.freeze()  # every test ends with a collection, which need not walk torch

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}

CLASS_NAMES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}

MakeCheckpoint = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeCheckpoint]:
    """(folder, transformers model) of a named architecture with random float32 weights."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str, **overrides: Any) -> tuple[Path, Any]:
        key = f"{name}-{sorted(overrides.items())}"
        if key not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**(SHAPE | overrides))
            class_name = CLASS_NAMES.get(name, f"{name}ForCausalLM")
            model = getattr(transformers, class_name)(config).eval().float()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            if not made:
                gc.collect()
                gc.freeze()  # transformers: a million objects that every collection would walk
            made[key] = folder, model
        return made[key]

    yield make
    gc.unfreeze()


TEXTS = [
    "The quick brown fox jumps over the lazy dog. It was a bright, cold day in April!",
    "Grüße aus Zürich: naïve café, señor, 2 × 3 = 6, 100 % €5.",
    "日本語のテキストと中文文本，한국어 문장도 있습니다。",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪, हिन्दी में पाठ, עברית, العربية, ไทย",
    "def f(x):\n    return x ** 2  # don't\n\n\tprint(f(3))",
]


def _train_tokenizer(kind: str) -> Any:
    """A small tokenizer of one of the kinds that models have, trained on `TEXTS`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options)
    elif kind == "sentencepiece":  # as Llama 2's: metaspace and byte fallback
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        options["special_tokens"] = special + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=480, limit_alphabet=70, **options)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=True)
        trainer = trainers.WordPieceTrainer(vocab_size=300, **options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind == "sentencepiece":  # the bytes are pieces of text, not special tokens
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], Any]:
    """A `tokenizers.Tokenizer`: "byte_level", "sentencepiece", "metaspace" or "wordpiece"."""
    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in made:
            made[kind] = _train_tokenizer(kind)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def multilingual_texts() -> list[str]:
    """Sentences in many scripts, with emoji of several code points."""
    return TEXTS


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where nbllm runs in a test that goes over every device; the reference stays on the CPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        # TF32 would leave float32 with 10 bits: nowhere near the reference.
        assert torch.get_float32_matmul_precision() == "highest"
    return request.param


@pytest.fixture(scope="session")
def generate_greedily() -> Callable[..., list[int]]:
    """(model, prompt, number of tokens) -> what transformers appends, with its KV cache.

    The loop of `generate` without its overhead, which is many times the tiny models' own work.
    """

    def generate(model: Any, prompt: list[int], num_tokens: int = 16) -> list[int]:
        tokens: list[int] = []
        cache = None
        with torch.inference_mode():
            model(torch.tensor([[0]]), use_cache=False)  # a short text resets "dynamic" rope
            while len(tokens) < num_tokens:
                new = prompt if cache is None else tokens[-1:]
                output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                tokens.append(int(output.logits[0, -1].argmax()))
        return tokens

    return generate


@pytest.fixture(autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def run_in_kernel() -> Iterator[Callable[[str], str]]:
    """Runs a cell in a real Jupyter kernel of its own; returns what it printed."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code: str) -> str:
        printed: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

        reply = client.execute_interactive(code, timeout=60, output_hook=collect)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed).strip()

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)
