"""df.llm.embed: the vectors of `LLM.embed`, at the rows' own places."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nbllm
from nbllm import LLM, InvalidRequestError, PoolingParams

TEXTS = ["The food was great.", "The film was awful.", "What is the capital of France?"]


def vector(llm: LLM, text: str, **params: object) -> np.ndarray:
    output = llm.embed(text, pooling_params=PoolingParams(**params))[0]  # type: ignore[arg-type]
    return np.array(output.outputs.embedding, dtype=np.float32)


def test_each_row_gets_its_vector_in_a_new_frame(llm: LLM) -> None:
    frame = pd.DataFrame({"text": [TEXTS[0], None, TEXTS[1]]}, index=[5, 5, 2])
    before = frame.copy()
    result = frame.llm.embed("text")
    pd.testing.assert_frame_equal(frame, before)
    assert list(result.columns) == ["text", "embedding", "embedding_error"]
    assert result.index.equals(frame.index)
    cells = result["embedding"].tolist()
    assert cells[1] is pd.NA
    for cell, text in ((cells[0], TEXTS[0]), (cells[2], TEXTS[1])):
        assert cell.dtype == np.float32 and cell.shape == (llm.model_config.hidden_size,)
        np.testing.assert_allclose(cell, vector(llm, text), atol=1e-5)
    assert result["embedding_error"].isna().all()


def test_the_vector_is_what_the_arguments_say(llm: LLM) -> None:
    frame = pd.DataFrame({"a": ["capital"], "b": ["France"]})
    options = {"pooling": "mean", "normalize": False, "dimensions": 16}
    result = frame.llm.embed("What is the {a} of {b}?", out="v", **options)
    expected = vector(llm, TEXTS[2], **options)
    assert abs(np.linalg.norm(expected) - 1) > 1e-3
    np.testing.assert_allclose(result["v"][0], expected, atol=1e-4)


def test_conversations_go_through_the_chat_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": TEXTS[2]}]
    cell = pd.DataFrame({"m": [messages]}).llm.embed("m")["embedding"][0]
    output = llm.embed(llm.encode_chat(messages))[0]
    np.testing.assert_allclose(cell, output.outputs.embedding, atol=1e-5)


def test_a_text_that_is_too_long_fails_alone_or_is_cut(llm: LLM) -> None:
    frame = pd.DataFrame({"text": [TEXTS[0], "word " * 5000]})
    result = frame.llm.embed("text")
    assert list(result["embedding"].isna()) == [False, True]
    assert "1024" in result["embedding_error"][1]
    cut = frame.llm.embed("text", truncate_prompt_tokens=8)
    assert cut["embedding_error"].isna().all()
    expected = llm.embed("word " * 5000, truncate_prompt_tokens=8)[0].outputs.embedding
    np.testing.assert_allclose(cut["embedding"][1], expected, atol=1e-5)
    with pytest.raises(InvalidRequestError) as caught:
        frame.llm.embed("text", truncate_prompt_tokens=0)
    assert caught.value.parameter == "truncate_prompt_tokens"


def test_a_series_gives_a_series_of_vectors(llm: LLM) -> None:
    series = pd.Series(["France", None], index=[4, 4], name="country")
    result = series.llm.embed("What is the capital of {}?", out="v")
    assert result.name == "v" and result.index.equals(series.index)
    np.testing.assert_allclose(result.iloc[0], vector(llm, TEXTS[2]), atol=1e-5)
    assert result.iloc[1] is pd.NA
    with pytest.raises(InvalidRequestError) as caught:
        series.llm.embed(errors="column")
    assert caught.value.parameter == "errors"


def test_the_asynchronous_twins_give_the_same(llm: LLM) -> None:
    frame = pd.DataFrame({"text": TEXTS})

    async def both() -> tuple[pd.DataFrame, pd.Series]:
        return await frame.llm.aembed("text"), await frame["text"].llm.aembed()

    result, series = asyncio.run(both())
    expected = np.stack(frame.llm.embed("text")["embedding"])
    np.testing.assert_allclose(np.stack(result["embedding"]), expected, atol=1e-5)
    np.testing.assert_allclose(np.stack(series), expected, atol=1e-5)


def test_an_asynchronous_call_raises_the_error_that_it_is_told_to(llm: LLM) -> None:
    frame = pd.DataFrame({"text": ["word " * 5000]})
    with pytest.raises(InvalidRequestError, match="1024"):
        asyncio.run(frame.llm.aembed("text", errors="raise"))


def test_overwrite_embeds_what_has_no_vector(llm: LLM) -> None:
    kept = np.ones(3, dtype=np.float32)
    frame = pd.DataFrame({"text": TEXTS[:2]})
    frame["embedding"] = pd.Series([kept, pd.NA], dtype=object)
    with pytest.raises(InvalidRequestError, match="overwrite=True"):
        frame.llm.embed("text")
    result = frame.llm.embed("text", overwrite=True)
    assert result["embedding"][0] is kept
    np.testing.assert_allclose(result["embedding"][1], vector(llm, TEXTS[1]), atol=1e-5)


def test_a_journal_keeps_the_vectors_to_the_last_bit(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = pd.DataFrame({"text": TEXTS})
    first = frame.llm.embed("text", journal=tmp_path / "j")
    seen: list[object] = []
    call = llm._embedding_call

    def spy(rows: object, keep: int | None) -> object:
        return call((seen.append(row) or row for row in rows), keep)  # type: ignore[attr-defined,func-returns-value]

    monkeypatch.setattr(llm, "_embedding_call", spy)
    again = frame.iloc[::-1].llm.embed("text", journal=tmp_path / "j", llm=llm)
    assert seen == []
    np.testing.assert_array_equal(np.stack(again["embedding"][::-1]), np.stack(first["embedding"]))
    frame.llm.embed("text", journal=tmp_path / "j", pooling="mean", llm=llm)
    assert len(seen) == 3
    resumed = nbllm.resume(tmp_path / "j")
    assert list(resumed.columns) == ["text", "embedding", "embedding_error"]


def test_equal_texts_are_embedded_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    call = llm._embedding_call

    def spy(rows: object, keep: int | None) -> object:
        return call((seen.append(row) or row for row in rows), keep)  # type: ignore[attr-defined,func-returns-value]

    monkeypatch.setattr(llm, "_embedding_call", spy)
    result = pd.DataFrame({"text": [TEXTS[0]] * 3}).llm.embed("text", llm=llm)
    assert len(seen) == 1
    assert result["embedding"].notna().all()


@pytest.mark.parametrize("values", [[], [None, None]])
def test_frames_with_nothing_to_embed(llm: LLM, values: list[None]) -> None:
    result = pd.DataFrame({"text": pd.Series(values, dtype=object)}).llm.embed("text")
    assert len(result) == len(values)
    assert result["embedding"].isna().all()


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 100_000}, "dimensions"),
        ({"na": "drop"}, "na"),
        ({"template_format": "mustache"}, "template_format"),
    ],
)
def test_a_wrong_argument_is_named(llm: LLM, options: dict[str, object], parameter: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        pd.DataFrame({"text": TEXTS}).llm.embed("text", errors="raise", **options)
    assert caught.value.parameter == parameter
    with pytest.raises(TypeError, match="colour"):
        pd.DataFrame({"text": TEXTS}).llm.embed("text", colour="red")
