"""Prompts in all their forms, and the requests that are made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbllm import InvalidRequestError, PromptTooLongError, SamplingParams
from nbllm.config import EngineConfig
from nbllm.inputs import EncodedPrompt, encode_prompts, is_single_prompt
from nbllm.model_config import parse_model_config
from nbllm.request_factory import RequestFactory

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "eos_token_id": [1, 2],
}


def encode_batch(texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
    for text in texts:
        if "!" in text:
            raise UnicodeError("no way")
    return [[len(word) for word in text.split()] for text in texts]


def make_factory(*, with_tokenizer: bool = True, **options: Any) -> RequestFactory:
    seeds = iter(range(100, 1000))
    return RequestFactory(
        EngineConfig(max_model_len=20, **options),
        parse_model_config(CONFIG, {}),
        tokenize=(lambda text: encode_batch([text])[0]) if with_tokenizer else None,
        make_stop_checker=lambda ids, params: lambda new: None,
        make_constraint=None,
        draw_seed=lambda: next(seeds),
    )


def test_one_prompt_is_told_from_many() -> None:
    for one in ("text", [1, 2], (1, 2), {"prompt": "x"}, {"prompt_token_ids": [1]}, [np.int64(3)]):
        assert is_single_prompt(one), one
    for many in ([], ["text"], [[1, 2]], [[]], [{"prompt": "x"}], ["text", [1]], [True]):
        assert not is_single_prompt(many), many


def test_every_form_of_a_prompt_is_understood() -> None:
    rows = encode_prompts(
        [
            "ab c",
            [4, 5],
            (6,),
            np.array([7, 8]).tolist(),
            {"prompt": "abc"},
            {"prompt_token_ids": [9]},
            {"prompt": "shown", "prompt_token_ids": (1, 2)},
        ],
        encode_batch,
    )
    assert [(row.text, row.token_ids) for row in rows] == [
        ("ab c", [2, 1]),
        (None, [4, 5]),
        (None, [6]),
        (None, [7, 8]),
        ("abc", [3]),
        (None, [9]),
        ("shown", [1, 2]),
    ]
    assert all(row.error is None for row in rows)


def test_a_prompt_that_is_none_has_an_error_of_its_own() -> None:
    bad: list[Any] = [None, 5, 1.5, {}, {"text": "x"}, ["a", 1], [1.0], [True], b"x", {"prompt": 3}]
    rows = encode_prompts(["good", *bad, "good"], encode_batch)
    assert [row.error is None for row in rows] == [True, *[False] * len(bad), True]
    for row in rows[1:-1]:
        assert isinstance(row.error, InvalidRequestError)
        assert row.error.parameter in ("prompts", "prompt_token_ids")


def test_a_text_that_cannot_be_encoded_takes_no_other_along() -> None:
    rows = encode_prompts(["a", "b!", "cc"], encode_batch)
    assert [row.token_ids for row in rows] == [[1], [], [2]]
    assert isinstance(rows[1].error, InvalidRequestError)


def test_text_needs_a_tokenizer() -> None:
    rows = encode_prompts(["a", [3]], None)
    assert isinstance(rows[0].error, InvalidRequestError) and rows[1].error is None
    for options in ({"stop": "x"}, {"bad_words": ["x"]}):
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            make_factory(with_tokenizer=False).make(
                EncodedPrompt(None, [3]), SamplingParams(**options)
            )


def test_max_tokens_is_what_fits() -> None:
    row = EncodedPrompt(None, [3] * 15)
    for asked, given in ((None, 5), (3, 3), (5, 5), (100, 5)):
        (request,) = make_factory().make(row, SamplingParams(max_tokens=asked))
        assert request.max_tokens == given


@pytest.mark.parametrize("length", [20, 21, 500])
def test_a_prompt_that_leaves_no_room_is_refused(length: int) -> None:
    with pytest.raises(PromptTooLongError, match=f"{length} tokens.*max_model_len is 20"):
        make_factory().make(EncodedPrompt(None, [3] * length), SamplingParams())


@pytest.mark.parametrize("ids", [[], [50], [3, -1], [2**40]])
def test_token_ids_are_checked(ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        make_factory().make(EncodedPrompt(None, ids), SamplingParams())


def test_continuations_share_a_leader_and_have_seeds_of_their_own() -> None:
    requests = make_factory().make(EncodedPrompt(None, [3]), SamplingParams(n=3, seed=5))
    assert [request.leader for request in requests] == [None, requests[0], requests[0]]
    assert len({request.seed for request in requests}) == 3
    assert requests[0].seed == 5
    assert len({request.request_id for request in requests}) == 3


def test_a_request_without_a_seed_draws_one() -> None:
    factory = make_factory()
    row = EncodedPrompt(None, [3])
    assert [factory.make(row, SamplingParams())[0].seed for _ in range(2)] == [100, 101]


def test_end_of_sequence_is_the_models_unless_it_is_ignored() -> None:
    row = EncodedPrompt(None, [3])
    assert make_factory().make(row, SamplingParams())[0].eos_token_ids == {1, 2}
    ignoring = make_factory().make(row, SamplingParams(ignore_eos=True))
    assert ignoring[0].eos_token_ids == frozenset()


def test_bad_words_are_taken_with_and_without_a_space() -> None:
    (request,) = make_factory().make(
        EncodedPrompt(None, [3]), SamplingParams(bad_words=["ab", "abc de"])
    )
    assert request.bad_words_token_ids == [[2], [3, 2]]


@pytest.mark.parametrize(
    ("limit", "asked", "is_fine"),
    [
        (20, 20, True),
        (20, 21, False),
        (20, -1, False),
        (50, -1, True),
        (-1, -1, True),
        (0, 0, True),
    ],
)
def test_logprobs_are_limited(limit: int, asked: int, is_fine: bool) -> None:
    factory = make_factory(max_logprobs=limit)
    for name in ("logprobs", "prompt_logprobs"):
        params = SamplingParams(**{name: asked})
        if is_fine:
            factory.make(EncodedPrompt(None, [3]), params)
        else:
            with pytest.raises(InvalidRequestError, match=name):
                factory.make(EncodedPrompt(None, [3]), params)


def test_the_parameters_must_be_sampling_params() -> None:
    wrong: Any = {"temperature": 0}
    with pytest.raises(InvalidRequestError, match="must be SamplingParams, got dict"):
        make_factory().make(EncodedPrompt(None, [3]), wrong)


def test_the_error_of_a_row_is_raised() -> None:
    error = InvalidRequestError("bad row")
    with pytest.raises(InvalidRequestError, match="bad row"):
        make_factory().make(EncodedPrompt(None, [], error), SamplingParams())
