"""The quickstart of vLLM's documentation, on a loopback hub."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer

RunClient = Callable[..., Any]

# The quickstart of vLLM's documentation; the import, and what a test needs, is all that differs.
QUICKSTART = """
import json
from nbllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model="facebook/opt-125m")
outputs = llm.generate(prompts, sampling_params)
texts = []
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    num_tokens = len(output.outputs[0].token_ids)
    texts.append([prompt, generated_text, output.prompt_token_ids, num_tokens])
print()
print(json.dumps({"texts": texts, "dtype": llm.config.dtype}))
"""


def opt_125m(make_checkpoint: Callable[..., Any]) -> dict[str, bytes]:
    """The files of facebook/opt-125m, with a small model in them."""
    words = ["Hello, my name is", "The president of the United States is", "The capital of France"]
    bpe = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(words * 4, vocab_size=300, min_frequency=1, special_tokens=specials)
    folder, model = make_checkpoint(
        "OPT",
        ffn_dim=96,
        init_std=0.2,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", None) and "float16"
    tensors = {n.removeprefix("model."): t.half() for n, t in model.state_dict().items()}
    weights = io.BytesIO()
    torch.save(tensors, weights)
    merges, vocabulary = io.StringIO(), json.loads(bpe.to_str())["model"]
    for left, right in vocabulary["merges"]:
        merges.write(f"{left} {right}\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokenizer_config = {
        "errors": "replace",
        "add_prefix_space": False,
        "add_bos_token": True,
        "special_tokens_map_file": None,
        "name_or_path": "patrickvonplaten/opt-30b",
        "tokenizer_class": "GPT2Tokenizer",
    } | {
        name: {
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "__type": "AddedToken",
        }
        for name, text in special.items()
        if name != "pad_token"
    }
    documents = {
        "config.json": config,
        "vocab.json": vocabulary["vocab"],
        "special_tokens_map.json": special,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    }
    files = {name: json.dumps(content).encode() for name, content in documents.items()}
    return files | {
        "merges.txt": b"#version: 0.2\n" + merges.getvalue().encode(),
        "pytorch_model.bin": weights.getvalue(),
        "tf_model.h5": b"tensorflow",
        "flax_model.msgpack": b"jax",
    }


def test_the_quickstart_of_vllm_runs_with_the_import_changed(
    hub: Any, run_client: RunClient, make_checkpoint: Callable[..., Any]
) -> None:
    hub.add("facebook/opt-125m", opt_125m(make_checkpoint))
    result = run_client(QUICKSTART, None)
    assert not {"tf_model.h5", "flax_model.msgpack"} & set(hub.downloads())
    prompts = [prompt for prompt, *_ in result["texts"]]
    assert prompts[0] == "Hello, my name is" and len(prompts) == 4
    for _, text, prompt_token_ids, num_tokens in result["texts"]:
        assert isinstance(text, str) and num_tokens >= 1
        assert prompt_token_ids[0] == 2 and len(prompt_token_ids) > 2  # </s> opens every text
