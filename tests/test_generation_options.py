"""Every sampling parameter end to end, through `LLM` on tiny models, against transformers."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from nbllm import (
    LLM,
    BeamSearchParams,
    InvalidRequestError,
    RepetitionDetectionParams,
    RequestFailedError,
    RequestOutputKind,
    SamplingParams,
)

VOCAB_SIZE = 10
EOS = 1
PROMPT = [3, 5, 3, 8]


@pytest.fixture(scope="module")
def small(make_checkpoint: Callable[..., Any]) -> Iterator[tuple[LLM, Any]]:
    """An LLM with ten tokens, so that all texts of two tokens can be counted; its reference."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    folder, model = make_checkpoint("Qwen3", vocab_size=VOCAB_SIZE, initializer_range=0.5, **sizes)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": 512}
    with LLM(folder, skip_tokenizer_init=True, max_model_len=64, **options) as llm:
        yield llm, model


@pytest.fixture(scope="module")
def text_llm(
    make_checkpoint: Callable[..., Any],
    make_tokenizer: Callable[[str], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LLM]:
    """An LLM with a byte-level tokenizer; its texts are random bytes of many scripts."""
    tokenizer = make_tokenizer("byte_level")
    size = tokenizer.get_vocab_size()
    made, _ = make_checkpoint("Qwen3", head_dim=16, num_hidden_layers=2, vocab_size=size + 8)
    folder = tmp_path_factory.mktemp("text")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<s>", "bos_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with LLM(folder, dtype="float32", device="cpu", max_model_len=128) as llm:
        llm._thread._engine.check_integrity = True
        yield llm


def raw_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[len, vocab_size] float64."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].double()


def raw_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[len, vocab_size] float64: after each token, the distribution of the next."""
    return torch.log_softmax(raw_logits(model, token_ids), dim=-1)


# -- distributions --------------------------------------------------------------------------------


def processed(logits: np.ndarray, output: list[int], params: SamplingParams) -> np.ndarray:
    """Probabilities of the next token, from the definition."""
    x = logits.copy()
    if params.allowed_token_ids is not None:
        x[[t for t in range(VOCAB_SIZE) if t not in params.allowed_token_ids]] = -np.inf
    if len(output) < params.min_tokens:
        x[[EOS, *(params.stop_token_ids or ())]] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in {*PROMPT, *output}:
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    p = np.exp(x / params.temperature - np.max(x / params.temperature))
    p[p < params.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    before = np.concatenate([[0], np.cumsum(p[order] / p.sum())[:-1]])
    p[order[before >= params.top_p]] = 0
    return p / p.sum()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.4, "top_p": 0.8},
    {"min_p": 0.1, "temperature": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.4},
    {"logit_bias": {4: 2.0, EOS: 3.0}, "min_tokens": 1, "stop_token_ids": [6]},
    {"allowed_token_ids": [0, EOS, 3, 5, 9], "top_p": 0.9, "repetition_penalty": 0.8},
    {"temperature": 0.9, "top_k": 8, "top_p": 0.95, "min_p": 0.01, "frequency_penalty": 1.2},
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_texts_of_two_tokens_have_the_exact_joint_distribution(
    small: tuple[LLM, Any], number: int
) -> None:
    llm, model = small
    num_texts = 1500
    base = SamplingParams(max_tokens=2, **OPTIONS[number])
    params = [base.clone(seed=seed) for seed in range(num_texts)]
    outputs = llm.generate([PROMPT] * num_texts, params, use_tqdm=False)
    observed: dict[tuple[int, ...], int] = {}
    for output in outputs:
        text = tuple(output.outputs[0].token_ids)
        observed[text] = observed.get(text, 0) + 1

    stops = {EOS, *(base.stop_token_ids or ())}
    logits = raw_logits(model, PROMPT)[-1].numpy()
    expected: dict[tuple[int, ...], float] = {}
    for first, p_first in enumerate(processed(logits, [], base)):
        if first in stops:
            expected[(first,)] = p_first
            continue
        logits_2 = raw_logits(model, [*PROMPT, first])[-1].numpy()
        for second, p_second in enumerate(processed(logits_2, [first], base)):
            expected[(first, second)] = p_first * p_second
    assert all(expected.get(text, 0) > 0 for text in observed)
    frequent = [text for text, p in expected.items() if p * num_texts >= 5]
    counts = [observed.get(text, 0) for text in frequent]
    shares = [expected[text] * num_texts for text in frequent]
    counts.append(num_texts - sum(counts))  # all the rare ones together
    shares.append(num_texts - sum(shares))
    if shares[-1] < 1e-6:
        counts.pop(), shares.pop()
    assert stats.chisquare(counts, shares).pvalue > 1e-3


def test_the_continuations_of_one_prompt_are_independent(small: tuple[LLM, Any]) -> None:
    llm, model = small
    params = SamplingParams(n=1500, max_tokens=1, seed=3)
    (output,) = llm.generate(PROMPT, params)
    tokens = [completion.token_ids[0] for completion in output.outputs]
    shares = raw_logprobs(model, PROMPT)[-1].exp().numpy() * params.n
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    frequent = shares >= 5
    assert (
        stats.chisquare(
            [*counts[frequent], counts[~frequent].sum() + 1e-9],
            [*shares[frequent], shares[~frequent].sum() + 1e-9],
        ).pvalue
        > 1e-3
    )
    assert [completion.index for completion in output.outputs] == list(range(params.n))


# -- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_logprobs", [0, 1, 3])
def test_logprobs_are_those_of_transformers_before_all_processing(
    small: tuple[LLM, Any], num_logprobs: int
) -> None:
    llm, model = small
    params = SamplingParams(
        temperature=0.6,
        top_k=4,
        presence_penalty=1.0,
        logit_bias={2: 1.0},
        seed=1,
        max_tokens=12,
        ignore_eos=True,
        logprobs=num_logprobs,
        prompt_logprobs=num_logprobs,
    )
    (output,) = llm.generate(PROMPT, params)
    completion = output.outputs[0]
    exact = raw_logprobs(model, [*PROMPT, *completion.token_ids])
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT) and len(completion.logprobs) == 12
    entries = [*output.prompt_logprobs[1:], *completion.logprobs]
    tokens = [*PROMPT[1:], *completion.token_ids]
    for position, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        order = exact[position].argsort(descending=True).tolist()
        assert entry is not None and set(entry) == {token, *order[:num_logprobs]}
        for token_id, logprob in entry.items():
            assert abs(logprob.logprob - float(exact[position, token_id])) < 1e-4
            assert logprob.rank == order.index(token_id) + 1
    total = sum(float(exact[len(PROMPT) - 1 + i, t]) for i, t in enumerate(completion.token_ids))
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_minus_one_reports_the_whole_vocabulary_if_the_llm_allows_it(
    small: tuple[LLM, Any],
) -> None:
    llm, _ = small  # ten tokens are fewer than max_logprobs=20
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    (output,) = llm.generate(PROMPT, params)
    assert output.outputs[0].logprobs is not None and output.prompt_logprobs is not None
    for entry in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
        assert entry is not None and len(entry) == VOCAB_SIZE
        assert sum(np.exp(x.logprob) for x in entry.values()) == pytest.approx(1.0, abs=1e-5)


def test_too_many_logprobs_are_refused(text_llm: LLM) -> None:
    for name, value in itertools.product(("logprobs", "prompt_logprobs"), (-1, 21)):
        with pytest.raises(InvalidRequestError, match="max_logprobs=20") as caught:
            text_llm.generate("a", SamplingParams(**{name: value}))
        assert caught.value.parameter == name


def test_named_tokens_are_reported(small: tuple[LLM, Any]) -> None:
    llm, model = small
    (output,) = llm.generate(
        PROMPT, SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=[7, 2])
    )
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert set(completion.logprobs[0]) == {completion.token_ids[0], 7, 2}
    exact = raw_logprobs(model, PROMPT)[-1]
    assert completion.logprobs[0][7].logprob == pytest.approx(float(exact[7]), abs=1e-4)


def test_logprobs_show_the_text_of_their_tokens(text_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=0)
    (output,) = text_llm.generate("The quick", params)
    tokenizer = text_llm.get_tokenizer()
    assert output.outputs[0].logprobs is not None and output.prompt_logprobs is not None
    for entry in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
        assert entry is not None
        for token_id, logprob in entry.items():
            assert logprob.decoded_token == tokenizer.token_text(token_id)


# -- where texts end ------------------------------------------------------------------------------


def greedy(llm: LLM, prompt: Any, **options: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**{"temperature": 0.0} | options))[0].outputs[0]


def test_a_stop_token_ends_the_text_and_is_its_reason(text_llm: LLM) -> None:
    free = greedy(text_llm, "The", max_tokens=12, ignore_eos=True)
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    ended = greedy(text_llm, "The", max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.token_ids == free.token_ids[: first + 1]
    kept = greedy(
        text_llm,
        "The",
        max_tokens=12,
        ignore_eos=True,
        stop_token_ids=[stop],
        include_stop_str_in_output=True,
    )
    decode = text_llm.get_tokenizer().decode
    assert ended.text == decode(ended.token_ids[:-1])
    assert kept.text == decode(ended.token_ids)


def test_end_of_sequence_ends_the_text_unless_it_is_ignored(text_llm: LLM) -> None:
    wants_eos = {"logit_bias": {EOS: 100.0}, "max_tokens": 5}
    ended = greedy(text_llm, "The", **wants_eos)
    assert (ended.token_ids, ended.text) == ([EOS], "")
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    ignored = greedy(text_llm, "The", ignore_eos=True, **wants_eos)
    assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 5, "length")
    postponed = greedy(text_llm, "The", min_tokens=3, **wants_eos)
    assert len(postponed.token_ids) == 4 and postponed.token_ids[-1] == EOS
    assert EOS not in postponed.token_ids[:3]


def test_a_stop_string_cuts_the_text_wherever_it_is(text_llm: LLM) -> None:
    free = greedy(text_llm, "The", max_tokens=40, ignore_eos=True)
    for start in range(2, len(free.text) - 5, 4):
        stop = free.text[start : start + 4]
        if "\ufffd" in stop:
            continue
        position = free.text.index(stop)
        for include in (False, True):
            cut = greedy(
                text_llm,
                "The",
                max_tokens=40,
                ignore_eos=True,
                stop=["never", stop],
                include_stop_str_in_output=include,
            )
            assert cut.text == free.text[: position + 4 * include]
            assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
            assert len(cut.token_ids) < 40 or free.text.endswith(stop)


def test_streams_add_up_to_what_generate_returns(text_llm: LLM) -> None:
    free = greedy(text_llm, "日本", max_tokens=60, ignore_eos=True, seed=1)
    stop = free.text[20:23]
    for seed, options in itertools.product(
        range(2), ({}, {"stop": stop}, {"logprobs": 1}, {"skip_special_tokens": False})
    ):
        params = SamplingParams(seed=seed, max_tokens=40, ignore_eos=True, **options)
        whole = text_llm.generate("日本", params)[0].outputs[0]
        deltas = list(text_llm.stream("日本", params.clone(output_kind=RequestOutputKind.DELTA)))
        assert "".join(d.outputs[0].text for d in deltas) == whole.text
        assert [i for d in deltas for i in d.outputs[0].token_ids] == whole.token_ids
        last = deltas[-1].outputs[0]
        assert (last.finish_reason, last.stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert all(d.outputs[0].finish_reason is None for d in deltas[:-1])
        assert last.cumulative_logprob == whole.cumulative_logprob
        texts = [item.outputs[0].text for item in text_llm.stream("日本", params)]
        assert texts[-1] == whole.text
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_deltas_of_several_continuations_say_whose_they_are(text_llm: LLM) -> None:
    params = SamplingParams(n=3, seed=2, max_tokens=12, min_tokens=3, logit_bias={EOS: 5.0})
    whole = text_llm.generate("The", params)[0].outputs
    texts, ends = ["", "", ""], [0, 0, 0]
    for item in text_llm.stream("The", params.clone(output_kind=RequestOutputKind.DELTA)):
        for completion in item.outputs:
            assert completion.token_ids or completion.finish_reason
            texts[completion.index] += completion.text
            ends[completion.index] += completion.finish_reason is not None
    assert texts == [completion.text for completion in whole]
    assert ends == [1, 1, 1]
    assert len({len(completion.token_ids) for completion in whole}) > 1


def test_only_the_final_item_is_streamed_on_request(text_llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=9, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    (item,) = text_llm.stream("The", params)
    assert item.finished and len(item.outputs[0].token_ids) == 9


def test_without_detokenize_there_is_no_text(text_llm: LLM) -> None:
    completion = greedy(text_llm, "The", max_tokens=5, ignore_eos=True, detokenize=False)
    assert completion.text == "" and len(completion.token_ids) == 5


def test_special_tokens_are_shown_on_request(text_llm: LLM) -> None:
    special = text_llm.get_tokenizer().backend.token_to_id("<|im_start|>")
    options: dict[str, Any] = {"max_tokens": 2, "logit_bias": {special: 100.0}}
    assert greedy(text_llm, "The", **options).text == ""
    shown = greedy(text_llm, "The", skip_special_tokens=False, **options).text
    assert shown == "<|im_start|>" * 2


def test_a_repeating_text_is_ended(text_llm: LLM) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=3, min_count=4)
    pattern = text_llm.get_tokenizer().encode("ab")[0]
    options: dict[str, Any] = {"max_tokens": 20, "logit_bias": {pattern: 100.0}}
    ended = greedy(text_llm, "The", repetition_detection=detection, **options)
    assert (ended.token_ids, ended.finish_reason) == ([pattern] * 4, "repetition")
    longer = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=3, min_count=2)
    ended = greedy(text_llm, "The", repetition_detection=longer, **options)
    assert len(ended.token_ids) == 6
    off = greedy(text_llm, "The", repetition_detection=RepetitionDetectionParams(), **options)
    assert (len(off.token_ids), off.finish_reason) == (20, "length")


def test_bad_words_do_not_occur(text_llm: LLM) -> None:
    for seed in range(6):
        base = SamplingParams(seed=seed, max_tokens=30, ignore_eos=True)
        free = text_llm.generate("The", base)[0].outputs[0]
        words = [w for w in free.text.split() if w.isalpha() and w.isascii()][:3]
        if not words:
            continue
        clean = text_llm.generate("The", base.clone(bad_words=words))[0].outputs[0]
        tokenizer = text_llm.get_tokenizer()
        for word in words:
            for ids in (tokenizer.encode(word), tokenizer.encode(" " + word)):
                windows = zip(*(clean.token_ids[i:] for i in range(len(ids))), strict=False)
                assert tuple(ids) not in set(windows)


def test_a_request_that_allows_no_token_fails_alone(text_llm: LLM) -> None:
    dead = SamplingParams(allowed_token_ids=[EOS], min_tokens=2, max_tokens=4)
    alive = SamplingParams(allowed_token_ids=[EOS, 40], min_tokens=2, max_tokens=4)
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        failed, fine = text_llm.generate(["The", "The"], [dead, alive], use_tqdm=False)
    assert isinstance(failed.error, RequestFailedError)
    assert fine.outputs[0].token_ids[:2] == [40, 40]


# -- lengths --------------------------------------------------------------------------------------


def test_without_max_tokens_a_text_goes_on_to_the_end_of_the_context(text_llm: LLM) -> None:
    with pytest.warns(UserWarning, match="2 text.* max_model_len=128") as caught:
        outputs = text_llm.generate(["The", "quick"], SamplingParams(ignore_eos=True))
    assert len(caught) == 1 and caught[0].filename == __file__
    for output in outputs:
        completion = output.outputs[0]
        assert len(output.prompt_token_ids) + len(completion.token_ids) == 128
        assert completion.finish_reason == "length"


def test_texts_cut_by_max_tokens_are_no_surprise(text_llm: LLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        completion = greedy(text_llm, "The", max_tokens=3, ignore_eos=True)
    assert completion.finish_reason == "length"


def test_ids_outside_of_the_vocabulary_are_refused(text_llm: LLM) -> None:
    size = text_llm.model_config.vocab_size
    for name, value in {
        "stop_token_ids": [size],
        "allowed_token_ids": [1, size],
        "logit_bias": {size: 1.0},
        "logprob_token_ids": [size],
    }.items():
        with pytest.raises(InvalidRequestError, match=str(size)) as caught:
            text_llm.generate("The", SamplingParams(**{name: value}))
        assert caught.value.parameter == name


def test_a_parameter_that_was_spoilt_after_its_check_is_refused(text_llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    params.temperature = float("nan")
    with pytest.raises(InvalidRequestError, match="temperature"):
        text_llm.generate("The", params)


def test_what_is_not_supported_says_so(text_llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="thinking_token_budget"):
        text_llm.generate("The", SamplingParams(thinking_token_budget=5))


# -- chat and beams -------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def test_a_chat_is_the_rendered_text(text_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    messages = [{"role": "user", "content": "The fox"}]
    (output,) = text_llm.chat(messages, params, chat_template=TEMPLATE)
    tokenizer = text_llm.get_tokenizer()
    assert output.prompt == "<|im_start|>user\nThe fox<|im_end|>"
    assert output.prompt_token_ids == tokenizer.encode(output.prompt, add_special_tokens=False)
    assert tokenizer.backend.token_to_id("<|im_end|>") == output.prompt_token_ids[-1]


def test_a_template_that_runs_wild_fails_alone(text_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    template = "{% if messages[0].content == 'bad' %}{{ 'a' * 10**9 }}{% endif %}ok"
    bad, good = ([{"role": "user", "content": text}] for text in ("bad", "good"))
    with pytest.raises(InvalidRequestError, match="chat template fails"):
        text_llm.chat(bad, params, chat_template=template)
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        failed, fine = text_llm.chat([bad, good], params, use_tqdm=False, chat_template=template)
    assert isinstance(failed.error, InvalidRequestError)
    assert fine.prompt == "ok" and len(fine.outputs[0].token_ids) == 3


def test_template_variables_are_not_arguments(text_llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for name in ("chat_template", "tokenize", "messages", "add_generation_prompt"):
        with pytest.raises(InvalidRequestError, match=name):
            text_llm.chat(messages, chat_template="x", chat_template_kwargs={name: True})
    rendered = text_llm.encode_chat(
        messages, chat_template="{{ mood }}{{ bos_token }}", chat_template_kwargs={"mood": "calm"}
    )
    assert rendered["prompt"] == "calm<unk>"


def test_the_text_of_a_beam_is_prompt_and_continuation(text_llm: LLM) -> None:
    (output,) = text_llm.beam_search("The quick", BeamSearchParams(beam_width=3, max_tokens=4))
    assert len(output.sequences) == 3
    decode = text_llm.get_tokenizer().decode
    for beam in output.sequences:
        assert beam.text is not None and beam.text.startswith("The quick")
        assert beam.text == decode(beam.tokens)
    scores = [beam.cum_logprob / len(beam.tokens) for beam in output.sequences]
    assert scores == sorted(scores, reverse=True)
