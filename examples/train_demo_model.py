"""Train the bundled demo model, from nothing, in minutes on one GPU.

    python examples/train_demo_model.py --output OUT --compile    # what nbllm/demo was made with
    python examples/train_demo_model.py --output OUT --tiny       # a minute on a CPU, to try it
    python examples/train_demo_model.py --evaluate nbllm/demo     # accuracy on held-out rows

The data come from `demo_data/`, the same for the same seed on any machine. Weights are equal
only up to the rounding of the GPU's kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from demo_data import batches, corpus

LENGTH = 512  # tokens of a packed row
VOCAB_SIZE = 3072
SPECIAL_TOKENS = [corpus.END_OF_TEXT, corpus.START, corpus.END]

# Capitalised words and digits never take the space in front of them into their tokens, so a name
# has the same tokens in a sentence and inside the quotes of JSON, and copying is copying.
_PIECES = r"""'(?:[sdmt]|ll|ve|re)\b| ?[\p{Ll}\p{Lo}\p{Lm}\p{M}]+|\p{Lu}[\p{Ll}\p{M}]*|\p{N}"""
_PIECES += r"""| ?[^\s\p{L}\p{N}\p{M}]+|\s+(?!\S)|\s+|[\s\S]"""


def train_tokenizer(folder: Path, seed: int) -> Path:
    """Byte-level BPE; every byte is in the vocabulary, so any text can be encoded."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(f"{seed}/tokenizer")
    special = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
    texts = [
        piece
        for _ in range(60_000)
        for turn in corpus.document(rng)
        for piece in special.split(turn.prompt + turn.answer)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "eos_token": corpus.END,
        "pad_token": corpus.END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(corpus.CHAT_TEMPLATE)
    return path


def make_model(vocab_size: int, *, tiny: bool) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64 if tiny else 256,
        intermediate_size=128 if tiny else 640,
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=2 if tiny else 4,
        num_key_value_heads=1 if tiny else 2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def prepare(rows: batches.Packed, index: torch.Tensor, device: str) -> tuple[torch.Tensor, ...]:
    """(token ids, positions, attention mask, trained) of some rows, on the device.

    A token attends to its own document only: [rows, 1, length, length] bool.
    """
    chosen = index.numpy()
    token_ids = torch.from_numpy(rows.token_ids[chosen].astype("int64")).to(device)
    starts = torch.from_numpy(rows.starts[chosen]).to(device)
    trained = torch.from_numpy(rows.trained[chosen]).to(device)
    columns = torch.arange(token_ids.shape[1], device=device)
    positions = columns - torch.cummax(torch.where(starts, columns, 0), dim=1).values
    document = starts.cumsum(dim=1)
    mask = (document[:, :, None] == document[:, None, :]) & (columns[:, None] >= columns[None, :])
    return token_ids, positions, mask[:, None], trained


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate_factor(step: int, num_steps: int, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def order_of_rows(num_rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless permutations of the rows, one an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_rows, generator=generator)


def train(
    model: Qwen3ForCausalLM, rows: batches.Packed, options: argparse.Namespace, device: str
) -> None:
    """Minimise the cross entropy of the trained tokens."""
    optimizer = make_optimizer(model, options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps)
    )
    body = torch.compile(model.model) if options.compile else model.model
    order = order_of_rows(len(rows.token_ids), options.seed)
    started = time.perf_counter()
    model.train()
    for step in range(options.steps):
        index = torch.stack([next(order) for _ in range(options.batch_size)])
        token_ids, positions, mask, trained = prepare(rows, index, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = body(
                input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][trained[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits.float(), token_ids[:, 1:][trained[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == options.steps - 1:
            seconds = time.perf_counter() - started
            speed = (step + 1) * token_ids.numel() / seconds
            print(f"step {step} loss {loss.item():.4f} {seconds:.0f} s {speed:,.0f} tokens/s")
    model.eval()


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Weights in bfloat16, the configuration and the recommended sampling."""
    model.to(torch.bfloat16).save_pretrained(folder)
    # Nearly greedy is what callers get who ask for no sampling in particular.
    settings = {"do_sample": True, "temperature": 0.1, "eos_token_id": [2, 0], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@torch.inference_mode()
def answers(folder: Path, rows: list[corpus.Row], device: str) -> list[str]:
    """Greedy float32 answers of the saved model, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    prompts = [
        row.prompt
        if isinstance(row.prompt, str)
        else tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    found = [""] * len(rows)
    for first in range(0, len(order), 512):
        part = order[first : first + 512]
        inputs = tokenizer([prompts[index] for index in part], padding=True, return_tensors="pt")
        inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        output: Any = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for index, text in zip(part, texts, strict=True):
            found[index] = text
    return found


def evaluate(folder: Path, *, num_rows: int, seed: int, device: str) -> dict[str, Any]:
    """Share of held-out rows answered exactly, by skill."""
    rng = Random(f"{seed}/held out")
    rows = [corpus.held_out_row(rng) for _ in range(num_rows)] + corpus.hand_written_rows()
    right: dict[str, list[bool]] = {}
    wrong: dict[str, list[str]] = {}
    for row, text in zip(rows, answers(folder, rows, device), strict=True):
        right.setdefault(row.skill, []).append(text.strip() == row.answer)
        if text.strip() != row.answer:
            wrong.setdefault(row.skill, []).append(
                f"{row.prompt!r} -> {text!r}, not {row.answer!r}"
            )
    for skill, texts in sorted(wrong.items()):
        print("\n".join([f"-- {skill}", *texts[:6]]))
    return {
        skill: {"rows": len(marks), "accuracy": round(sum(marks) / len(marks), 4)}
        for skill, marks in sorted(right.items())
    }


def show_samples(folder: Path, device: str) -> None:
    """What the model says to the quickstart's prompts."""
    prompts = ["Hello, my name is", "The president of the United States is",
               "The capital of France is", "The future of AI is", "Once upon a time",
               "What is the capital of France?", "Hello!"]  # fmt: skip
    rows = [corpus.Row("", prompt, "") for prompt in prompts]
    for prompt, text in zip(prompts, answers(folder, rows, device), strict=True):
        print(f"{prompt!r}: {text!r}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the trained model")
    parser.add_argument("--evaluate", type=Path, help="only measure the model in this folder")
    parser.add_argument("--tiny", action="store_true", help="a small model, few steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=96, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out-rows", type=int, default=6000)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if (options.output is None) == (options.evaluate is None):
        parser.error("give --output to train, or --evaluate to measure")
    if options.tiny:
        options.documents, options.steps, options.batch_size = 50_000, 200, 4
    return options


def main() -> None:
    options = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder: Path = options.evaluate or options.output
    if options.output:
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        started = time.perf_counter()
        tokenizer_file = train_tokenizer(folder, options.seed)
        rows = batches.pack_documents(
            tokenizer_file,
            seed=options.seed,
            num_documents=options.documents,
            length=LENGTH,
            num_workers=options.workers,
        )
        seconds = time.perf_counter() - started
        share = rows.trained.mean()
        print(f"{rows.token_ids.size / 1e6:.1f} M tokens, {share:.1%} trained, {seconds:.0f} s")
        model = make_model(VOCAB_SIZE, tiny=options.tiny).to(device)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")
        train(model, rows, options, device)
        save(model, folder)
    show_samples(folder, device)
    accuracy = evaluate(folder, num_rows=options.held_out_rows, seed=options.seed, device=device)
    text = json.dumps(accuracy, indent=1)
    print(text)
    if options.output:
        (folder / "accuracy.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
