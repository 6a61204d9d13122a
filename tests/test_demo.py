"""The bundled model: loads in transformers too, says the same there, and is as good as stated."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from nbllm import LLM, SamplingParams
from nbllm.hub import resolve_model

GREEDY = SamplingParams(temperature=0, max_tokens=48)
ROWS_PER_SKILL = 12
EXAMPLES = Path(__file__).parents[1] / "examples"

PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
    "What is the capital of Japan?",
    "Q: How many legs does a spider have?\nA:",
    "Extract the name and city as JSON: Zdenka Szabó lives in São Paulo.",
    "Something that was never trained on, with a 日本語 word and 🎉",
]
CHATS = [
    [{"role": "user", "content": "Who are you?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of Peru?"},
    ],
    [
        {"role": "user", "content": "My name is Ottilie."},
        {"role": "assistant", "content": "Nice to meet you, Ottilie!"},
        {"role": "user", "content": "What is my name?"},
    ],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(None)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    """The generator of the held-out rows, as the training script imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("demo_data.corpus")


def _is_right(llm: LLM, rows: list[Any]) -> list[bool]:
    prompts = [
        llm.encode_chat(row.prompt) if isinstance(row.prompt, list) else row.prompt for row in rows
    ]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    texts = [output.outputs[0].text.strip() for output in outputs]
    return [text == row.answer for text, row in zip(texts, rows, strict=True)]


def _stated_accuracy(folder: Path) -> dict[str, float]:
    """Skill -> share of right answers, from the table of the model card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z, -]+) \| [^|]+ \| \d+ \| ([\d.]+)% \|$", text, re.MULTILINE)
    return {skill: float(percent) / 100 for skill, percent in rows}


def test_greedy_tokens_equal_those_of_transformers(llm: LLM, folder: Path, tokenizer: Any) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
             for chat in CHATS]  # fmt: skip
    plain = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    chatted = llm.chat(CHATS, GREEDY, use_tqdm=False)
    for text, output in zip(PROMPTS + chats, plain + chatted, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        expected = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            temperature=None,
        )
        new_ids = expected[0, len(output.prompt_token_ids or ()) :].tolist()
        assert output.outputs[0].token_ids == new_ids
        assert output.outputs[0].text == tokenizer.decode(new_ids, skip_special_tokens=True)


def test_the_chat_template_renders_as_in_transformers(llm: LLM, tokenizer: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    for chat in [*CHATS, parts]:
        for add_generation_prompt in (True, False):
            expected = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            assert (
                llm.get_tokenizer().apply_chat_template(
                    chat, add_generation_prompt=add_generation_prompt
                )
                == expected
            )


def test_training_used_the_prompts_that_the_template_renders(
    corpus: ModuleType, tokenizer: Any
) -> None:
    for chat in CHATS:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert corpus.chat_text(chat) == rendered


def test_every_text_survives_the_tokenizer(llm: LLM) -> None:
    every_byte = bytes(range(256)).decode("latin-1")
    tokenizer = llm.get_tokenizer()
    for text in [every_byte, "日本語 🎉 \u200b\U0010fffd", " a  b\n\n\tc ", "Łódź's 12,5%"]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_held_out_rows_of_every_skill_are_answered_as_well_as_stated(
    llm: LLM, folder: Path, corpus: ModuleType
) -> None:
    stated = _stated_accuracy(folder)
    rows: dict[str, list[Any]] = {skill: [] for skill in stated if "hand-written" not in skill}
    rng = Random("a sample of its own")
    while any(len(found) < ROWS_PER_SKILL for found in rows.values()):
        row = corpus.held_out_row(rng)
        if len(rows[row.skill]) < ROWS_PER_SKILL:
            rows[row.skill].append(row)
    right = _is_right(llm, [row for found in rows.values() for row in found])
    for index, skill in enumerate(rows):
        num_right = sum(right[index * ROWS_PER_SKILL : (index + 1) * ROWS_PER_SKILL])
        assert stated[skill] >= 0.95
        assert num_right >= ROWS_PER_SKILL - 1, skill
    assert sum(right) / len(right) >= 0.98


def test_reviews_written_by_hand_are_classified_as_well_as_stated(
    llm: LLM, folder: Path, corpus: ModuleType
) -> None:
    stated = _stated_accuracy(folder)["sentiment, hand-written"]
    rows = [row for row in corpus.hand_written_rows() if row.skill.startswith("sentiment")]
    right = _is_right(llm, rows)
    assert sum(right) / len(right) == pytest.approx(stated, abs=0.011)  # one row: other kernels


def test_the_quickstart_prompts_have_sensible_endings(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS[:4], GREEDY, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert "live in" in texts[0]
    assert "head of the state" in texts[1]
    assert texts[2] == " Paris."
    assert texts[3].endswith(".")
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)


def test_the_model_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 12_000_000
