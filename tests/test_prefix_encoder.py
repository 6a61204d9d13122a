"""Texts that begin alike get the ids that they get alone."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from nbllm.hub import resolve_model
from nbllm.prefix_encoder import PrefixEncoder

# The expressions of GPT-2 (in ByteLevel), Llama 3 and Qwen.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
PIECES = [
    *("the", "Cat", " sat", " ", "  ", "\n", "\n\n", " \n ", "\t", "12345", "'ll", "'", "l", "é"),
    *("e\u0301", "\u0301", "漢字", "🤖", "!", "...", "I'm", "don't", "_", "<|im_start|>", "<|im_"),
    *("end|>", "<s>", "\r\n", "\u00a0", "x" * 70, " " * 90, "\n" * 40, "9" * 80),
]


def train(splitter: Any, normalizer: Any = None) -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = splitter
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = ["".join(rng.choice(PIECES) for _ in range(60)) for _ in range(80)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(corpus, trainer)
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return fast


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def with_bos(fast: FastTokenizer) -> FastTokenizer:
    fast.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    return fast


TOKENIZERS = {
    "GPT-2": train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "Llama 3": with_bos(train(split(LLAMA_3))),
    "Qwen": train(split(QWEN), normalizers.NFC()),
    "demo": FastTokenizer.from_file(str(resolve_model(None) / "tokenizer.json")),
}

texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(head=st.lists(st.sampled_from(PIECES), min_size=60, max_size=120), tails=st.lists(texts))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_text_gets_the_ids_that_it_gets_alone(
    name: str, head: list[str], tails: list[str]
) -> None:
    fast = TOKENIZERS[name]
    batch = ["".join(head) + tail for tail in tails]
    for add_special_tokens in (True, False):
        ids = PrefixEncoder(fast).encode_batch(batch, add_special_tokens)
        assert ids == [fast.encode(t, add_special_tokens=add_special_tokens).ids for t in batch]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_template_is_tokenized_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PrefixEncoder(TOKENIZERS[name])
    template = "Say in one word whether the writer liked the film, and don't explain. " * 8
    encoded: list[list[str]] = []
    encode = encoder._encode

    def spy(texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        encoded.append(texts)
        return encode(texts, add_special_tokens)

    monkeypatch.setattr(encoder, "_encode", spy)
    batch = [template + f"Film number {number}" for number in range(50)]
    ids = encoder.encode_batch(batch, True)
    assert ids == [TOKENIZERS[name].encode(text).ids for text in batch]
    assert max(map(len, encoded[-1])) < 150 < len(template)


@pytest.mark.parametrize(
    "splitter",
    [
        pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    ids=["Metaspace", "prefix space", "no words"],
)
def test_tokenizers_that_are_not_cut_give_the_same_ids_too(splitter: Any) -> None:
    fast = train(splitter)
    batch = [("the Cat sat  " * 40) + str(number) for number in range(5)]
    encoder = PrefixEncoder(fast)
    assert encoder._find_head(batch, True) is None
    assert encoder.encode_batch(batch, True) == [fast.encode(text).ids for text in batch]


def test_a_description_without_splitters_is_not_cut() -> None:
    fast = FastTokenizer(models.BPE())
    assert json.loads(fast.to_str())["pre_tokenizer"] is None
    assert PrefixEncoder(fast).encode_batch([], True) == []
