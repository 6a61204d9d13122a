"""Tokenizer against transformers' AutoTokenizer, for several kinds of model folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbllm import InvalidRequestError, ModelLoadError
from nbllm.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_folder(folder: Path, fast: Any, config: dict[str, Any], kind: str = "json") -> Path:
    if kind == "json":
        fast.save(str(folder / "tokenizer.json"))
    else:
        fast.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def with_bos(fast: Any, add_bos: bool) -> Any:
    """A copy that puts <s> before a text."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.processors import TemplateProcessing

    fast = FastTokenizer.from_str(fast.to_str())
    if add_bos:
        fast.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", fast.token_to_id("<s>"))]
        )
    return fast


def random_texts(texts: list[str]) -> list[str]:
    rng = random.Random(0)
    found = [
        *texts,
        "",
        " ",
        "  two  spaces ",
        "<s>inside</s> it",
        "<|im_start|>user\n",
        "\x00\t\r\n",
    ]
    for _ in range(200):
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        piece = text[start : start + rng.randint(1, 30)]
        found.append(piece + rng.choice(("", " ", "</s>", "🤖", "<|im_end|>", " ok")))
    return found


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace", "wordpiece"])
@pytest.mark.parametrize("add_bos", [False, True], ids=["", "bos"])
def test_a_tokenizer_json_works_as_in_transformers(
    kind: str,
    add_bos: bool,
    tmp_path: Path,
    make_tokenizer: Callable[[str], Any],
    multilingual_texts: list[str],
) -> None:
    from transformers import AutoTokenizer

    config = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_folder(tmp_path, with_bos(make_tokenizer(kind), add_bos), config)
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(folder)
    texts = random_texts(multilingual_texts)
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tokenizer.encode(text) == reference.encode(text), repr(text)
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert plain == reference.encode(text, add_special_tokens=False)
        for skip in (True, False):
            expected = reference.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    assert (tokenizer.encode("a")[0] == tokenizer.bos_token_id) == add_bos
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert set(reference.all_special_ids) <= tokenizer.all_special_ids
    ids = batch[0]
    assert tokenizer.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)
    assert tokenizer.convert_ids_to_tokens([10**6]) == [None]


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", None])
def test_vocab_and_merges_are_enough(
    tokenizer_class: str | None,
    tmp_path: Path,
    make_tokenizer: Callable[[str], Any],
    multilingual_texts: list[str],
) -> None:
    from transformers import AutoTokenizer

    config: dict[str, Any] = {**SPECIAL, "add_bos_token": True}  # as facebook/opt-125m has it
    if tokenizer_class is None:
        (tmp_path / "config.json").write_text('{"model_type": "opt"}', encoding="utf-8")
    else:
        config["tokenizer_class"] = tokenizer_class
    folder = write_folder(tmp_path, make_tokenizer("byte_level"), config, kind="bpe")
    assert not (folder / "tokenizer.json").exists()
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(folder)
    for text in random_texts(multilingual_texts):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), repr(text)
        expected = reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(ids) == expected
    assert tokenizer.eos_token_id == reference.eos_token_id


def test_a_token_with_a_role_is_special(
    tmp_path: Path, make_tokenizer: Callable[[str], Any]
) -> None:
    fast = make_tokenizer("byte_level")
    word = "brown"
    token = fast.id_to_token(fast.encode(word).ids[0])
    folder = write_folder(tmp_path, fast, {"eos_token": {"content": token}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_id == fast.token_to_id(token)
    assert tokenizer.eos_token_id in tokenizer.all_special_ids
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""


def test_added_tokens_may_stand_in_the_configuration_alone(
    tmp_path: Path, make_tokenizer: Callable[[str], Any]
) -> None:
    from transformers import AutoTokenizer

    fast = make_tokenizer("byte_level")
    size = fast.get_vocab_size()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = {
        str(size): {"content": "<|extra|>", "special": True, **flags},
        str(size + 1): {"content": "<tool>", "special": False, **flags},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    folder = write_folder(tmp_path, fast, config)
    tokenizer, reference = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    text = "a<|extra|>b<tool>c"
    assert tokenizer.encode(text) == reference.encode(text)
    assert {size, size + 1} <= set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == "ab<tool>c"


def test_truncation_and_padding_of_the_file_do_not_count(
    tmp_path: Path, make_tokenizer: Callable[[str], Any]
) -> None:
    fast = with_bos(make_tokenizer("byte_level"), True)
    fast.enable_truncation(4)
    fast.enable_padding(length=12)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, fast, {}))
    assert len(tokenizer.encode("The quick brown fox jumps over the lazy dog.")) > 6
    assert len(tokenizer.encode_batch(["a", "The quick brown fox"])[0]) == 2


def test_templates_come_from_all_places(
    tmp_path: Path, make_tokenizer: Callable[[str], Any]
) -> None:
    fast = make_tokenizer("byte_level")
    messages = [{"role": "user", "content": "Hi"}]
    named = [
        {"name": "default", "template": "D {{ messages[0].content }}{{ bos_token }}"},
        {"name": "tool_use", "template": "T {{ tools | length }}"},
    ]
    folder = write_folder(tmp_path, fast, {"chat_template": named, **SPECIAL})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(messages) == "D Hi<s>"
    assert tokenizer.apply_chat_template(messages, tools=[{}, {}]) == "T 2"
    assert tokenizer.apply_chat_template(messages, chat_template="tool_use", tools=[]) == "T 0"
    assert tokenizer.apply_chat_template(messages, chat_template="own {{ x }}", x=5) == "own 5"
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "file"


def test_no_template_is_said_clearly(make_tokenizer: Callable[[str], Any]) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer(make_tokenizer("byte_level")).apply_chat_template([{"role": "user"}])


def test_half_a_surrogate_pair_is_refused(make_tokenizer: Callable[[str], Any]) -> None:
    with pytest.raises(InvalidRequestError, match="can't encode"):
        Tokenizer(make_tokenizer("byte_level")).encode("a\ud800b")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "tokenizer.json"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja"),
        ("special_tokens_map.json", "nonsense", "special_tokens_map.json"),
    ],
)
def test_a_damaged_file_is_named(
    name: str,
    content: Any,
    word: str,
    tmp_path: Path,
    make_tokenizer: Callable[[str], Any],
) -> None:
    folder = write_folder(tmp_path, make_tokenizer("byte_level"), {})
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    with pytest.raises(ModelLoadError, match=word):
        Tokenizer.from_folder(folder)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="skip_tokenizer_init"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(ModelLoadError, match="can't be loaded"):
        Tokenizer.from_folder(tmp_path)


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')", encoding="utf-8")
    with pytest.raises(ModelLoadError):
        Tokenizer.from_folder(tmp_path)
    assert not marker.exists()
