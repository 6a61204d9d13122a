"""Incremental detokenization: what is streamed is what is returned, and stop strings are found."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from nbllm.detokenizer import IncrementalDetokenizer
from nbllm.stop_strings import StopFinder
from nbllm.tokenizer import Tokenizer

KINDS = ["byte_level", "sentencepiece", "metaspace", "wordpiece"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[[str], Any]) -> Tokenizer:
    return Tokenizer(make_tokenizer(request.param))


@pytest.fixture(scope="module")
def byte_level(make_tokenizer: Callable[[str], Any]) -> Tokenizer:
    return Tokenizer(make_tokenizer("byte_level"))


def stream(detokenizer: IncrementalDetokenizer, ids: list[int], rng: random.Random) -> list[str]:
    """The deltas of `ids`, pushed in random portions."""
    deltas = []
    start = 0
    while start < len(ids):
        end = start + rng.choice((1, 1, 1, 2, 5, 30))
        deltas.append(detokenizer.push(ids[start:end]))
        start = end
    deltas.append(detokenizer.finish())
    return deltas


def sample_ids(tokenizer: Tokenizer, texts: list[str], rng: random.Random) -> list[int]:
    """Ids of texts, random ids, or both: also invalid UTF-8 and ids outside of the vocabulary."""
    ids: list[int] = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.6:
            text = rng.choice(texts)
            start = rng.randrange(len(text))
            ids += tokenizer.encode(text[start : start + rng.randint(1, 40)])
        else:
            ids += [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randint(1, 12))]
    return ids


def test_500_seeded_streams_of_each_tokenizer_add_up_to_the_text(
    tokenizer: Tokenizer, multilingual_texts: list[str]
) -> None:
    for seed in range(500):
        rng = random.Random(seed)
        ids = sample_ids(tokenizer, multilingual_texts, rng)
        prompt = sample_ids(tokenizer, multilingual_texts, rng)[: rng.choice((0, 1, 9))]
        whole = tokenizer.decode(ids)
        stop: list[str] = []
        if len(whole) > 4 and rng.random() < 0.6:  # a part of the text, whatever its tokens
            start = rng.randrange(len(whole) - 1)
            stop = [whole[start : start + rng.randint(1, 6)], "no such text"]
        options: dict[str, Any] = {
            "prompt_token_ids": prompt,
            "stop": stop,
            "include_stop_str_in_output": rng.random() < 0.5,
            "skip_special_tokens": rng.random() < 0.7,
            "min_tokens": rng.choice((0, 0, 5)),
        }
        at_once = IncrementalDetokenizer(tokenizer, **options)
        at_once.push(ids)
        at_once.finish()
        streamed = IncrementalDetokenizer(tokenizer, **options)
        deltas = stream(streamed, ids, rng)
        assert "".join(deltas) == streamed.text == at_once.text, seed
        assert streamed.num_chars == len(streamed.text)
        assert streamed.stop_reason == at_once.stop_reason, seed


def test_the_text_is_what_the_tokenizer_decodes(
    tokenizer: Tokenizer, multilingual_texts: list[str]
) -> None:
    rng = random.Random(0)
    for seed in range(300):
        rng = random.Random(seed)
        ids: list[int] = []
        for _ in range(3):
            ids += tokenizer.encode(rng.choice(multilingual_texts), add_special_tokens=False)
            ids += rng.sample(sorted(tokenizer.all_special_ids), rng.randint(0, 2))
        detokenizer = IncrementalDetokenizer(tokenizer)
        deltas = stream(detokenizer, ids, rng)
        assert "".join(deltas) == tokenizer.decode(ids), seed


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_random_bytes_become_what_the_tokenizer_decodes(
    kind: str, make_tokenizer: Callable[[str], Any]
) -> None:
    # "sentencepiece" is left out where a valid character was shown before its run of bytes turned
    # out to be invalid: then the whole run decodes to U+FFFD, but what is out is out.
    tokenizer = Tokenizer(make_tokenizer(kind))
    for seed in range(300):
        rng = random.Random(seed)
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        whole = tokenizer.decode(ids)
        detokenizer = IncrementalDetokenizer(tokenizer)
        detokenizer.push(ids)
        detokenizer.finish()
        if kind == "byte_level":
            assert detokenizer.text == whole, seed
        else:
            assert len(detokenizer.text) <= len(whole) + 1


def test_a_character_spread_over_tokens_is_never_shown_incomplete(
    tokenizer: Tokenizer, multilingual_texts: list[str]
) -> None:
    for text in multilingual_texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if "\ufffd" in tokenizer.decode(ids):
            continue
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert all("\ufffd" not in detokenizer.push([token_id]) for token_id in ids)
        assert detokenizer.finish() == ""


def test_an_incomplete_character_shows_at_the_end_only(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a👦")
    assert byte_level.decode(ids[:-1]).endswith("\ufffd")
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.push(ids[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_the_prompt_decides_whether_the_first_space_is_kept(
    make_tokenizer: Callable[[str], Any],
) -> None:
    for kind in ("sentencepiece", "metaspace"):
        tokenizer = Tokenizer(make_tokenizer(kind))
        first, second = tokenizer.encode("The"), tokenizer.encode("quick")
        detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=first)
        assert detokenizer.push(second) == " quick"
        assert IncrementalDetokenizer(tokenizer).push(second) == "quick"


def test_skipped_special_tokens_leave_the_spaces_around_them(
    make_tokenizer: Callable[[str], Any],
) -> None:
    for kind in ("sentencepiece", "metaspace"):
        tokenizer = Tokenizer(make_tokenizer(kind))
        special = tokenizer.backend.token_to_id("<|im_end|>")
        ids = [*tokenizer.encode("The"), special, special, *tokenizer.encode("quick")]
        detokenizer = IncrementalDetokenizer(tokenizer)
        detokenizer.push(ids)
        assert detokenizer.text == "The quick" == tokenizer.decode(ids)


# -- stop strings ---------------------------------------------------------------------------------


def push_all(tokenizer: Tokenizer, text: str, **options: Any) -> IncrementalDetokenizer:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    detokenizer.push(tokenizer.encode(text))
    detokenizer.finish()
    return detokenizer


def test_a_stop_string_is_found_wherever_tokens_end(
    byte_level: Tokenizer, multilingual_texts: list[str]
) -> None:
    for text in multilingual_texts:
        for start in range(0, len(text) - 3, 3):
            stop = text[start : start + 3]
            position = text.index(stop)
            cut = push_all(byte_level, text, stop=[stop])
            assert (cut.text, cut.stop_reason) == (text[:position], stop)
            kept = push_all(byte_level, text, stop=[stop], include_stop_str_in_output=True)
            assert kept.text == text[: position + 3]


def test_nothing_of_a_stop_string_is_ever_streamed(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["lazy dog"])
    shown = ""
    for token_id in byte_level.encode("over the lazy cat and the lazy dog. Go on"):
        shown += detokenizer.push([token_id])
        assert not shown.endswith(("lazy", "lazy d"))
    assert shown + detokenizer.finish() == "over the lazy cat and the "


def test_text_that_only_began_like_a_stop_string_comes_at_the_end(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["</end>"])
    assert detokenizer.push(byte_level.encode("well</en")) == "well"
    assert detokenizer.finish() == "</en"
    assert detokenizer.stop_reason is None


def test_a_stop_string_within_min_tokens_does_not_count(byte_level: Tokenizer) -> None:
    text = "stop here, and stop there"
    num_tokens = len(byte_level.encode("stop here, and st"))
    early = push_all(byte_level, text, stop=["stop"])
    assert early.text == ""
    late = push_all(byte_level, text, stop=["stop"], min_tokens=num_tokens)
    assert (late.text, late.stop_reason) == ("stop here, and ", "stop")


def test_the_string_that_ends_first_stops_and_the_longer_one_of_two() -> None:
    assert StopFinder(["abc", "b"]).feed("xabc") == (2, "b")
    assert StopFinder(["bc", "abc", "c"]).feed("xabc") == (1, "abc")
    assert StopFinder(["aab"]).feed("aaab") == (1, "aab")
    assert StopFinder(["ab", "abab"]).feed("ab") == (0, "ab")


def test_stop_strings_are_found_as_by_brute_force() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        text = "".join(rng.choice("ab") for _ in range(20))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(3)]
        found = [
            (end, start, text[start:end])
            for end in range(1, len(text) + 1)
            for start in range(end)
            if text[start:end] in stops
        ]
        expected = (found[0][1], found[0][2]) if found else None
        assert StopFinder(stops).feed(text) == expected, (text, stops)


def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        stops = ["".join(rng.choices("ab", k=rng.randint(4, 9))) for _ in range(3)]
        finder = StopFinder(stops)
        text = ""
        for char in rng.choices("ab", k=30):
            text += char
            if finder.feed(char) is not None:
                break
            held = max(
                n
                for n in range(len(text) + 1)
                if n == 0 or any(s.startswith(text[-n:]) for s in stops)
            )
            assert finder.open_from == len(text) - held


def test_100_000_stop_strings_cost_hardly_more_than_one(byte_level: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 100
    ids = byte_level.encode(text)
    rng = random.Random(0)
    stops = ["".join(rng.choices("abcdefgh THQ", k=20)) for _ in range(100_000)]
    start = time.perf_counter()
    detokenizer = IncrementalDetokenizer(byte_level, stop=[*stops, "dog. Theq"])
    detokenizer.push(ids)
    detokenizer.finish()
    assert detokenizer.text == text
    assert time.perf_counter() - start < 5.0  # 0.3 s; a search for each would take minutes


def test_the_cost_of_a_token_does_not_grow_with_the_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("The quick brown fox. ") * 2000
    detokenizer = IncrementalDetokenizer(byte_level, stop=["no such"])
    most_tokens = 0
    decode = detokenizer._decode

    def counting(window: Any) -> str:
        nonlocal most_tokens
        most_tokens = max(most_tokens, len(window))
        return decode(window)

    detokenizer._decode = counting  # type: ignore[method-assign]
    for token_id in ids:
        detokenizer.push([token_id])
        assert len(detokenizer._pieces) <= 1001
    assert most_tokens <= 8
