"""Playground: what is shown is what the engine says, and what was asked for last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from nbllm import LLM, EngineClosedError, InvalidRequestError, SamplingControls, SamplingParams
from nbllm.errors import PromptTooLongError
from nbllm.widgets.playground import Playground
from nbllm.widgets.token_reader import TokenReader

STORY = "Once upon a time"
LONG = "Q: What is the capital of France?\nA: Paris\n" * 6 + "Q: What is the capital of Italy?\nA:"
WARM = SamplingParams(temperature=1.2, max_tokens=16, seed=3)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32") as llm:
        yield llm


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.002)


def record(playground: Playground) -> list[dict[str, Any]]:
    """What goes to the views from now on: messages, and states as they are set."""
    messages: list[dict[str, Any]] = []

    def publish(kind: str, data: Any = None, *args: Any, **options: Any) -> None:
        if data and data.get("method") == "custom":
            messages.append({"at": time.perf_counter(), **data["content"]})
        elif data and "state" in data.get("state", {}):
            messages.append({"type": "state", **data["state"]["state"]})

    playground.comm.publish_msg = publish
    return messages


def ask(playground: Playground, **content: Any) -> None:
    """What a view sends."""
    playground._handle_custom_msg(content, [])


def ids(playground: Playground, lane: int = 0) -> list[int]:
    return [token.token_id for token in playground.lanes[lane].tokens]


def test_a_run_shows_the_text_and_the_odds_of_the_engine(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=WARM)
    assert playground.run().wait(20) is playground
    expected = llm.generate(STORY, WARM.clone(logprobs=5))[0].outputs[0]
    assert playground.text == expected.text
    assert playground.result is not None
    completion = playground.result.outputs[0]
    assert completion.token_ids == expected.token_ids == ids(playground)
    assert completion.finish_reason == expected.finish_reason == "length"
    assert completion.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
    assert expected.logprobs is not None and completion.logprobs is not None
    assert len(completion.logprobs) == len(expected.logprobs)
    for token, position in zip(playground.lanes[0].tokens, expected.logprobs, strict=True):
        assert token.logprob == pytest.approx(position[token.token_id].logprob, abs=1e-3)
        assert {other.token_id for other in token.alternatives} == set(position)
        best = token.alternatives[0].logprob
        assert best == max(other.logprob for other in token.alternatives)
    stats = playground.lanes[0].stats
    assert stats["ttft_ms"] > 0 and stats["tokens_per_s"] > 0 and stats["seed"] == 3


def test_views_get_each_token_once_in_numbered_messages_and_not_too_many(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=WARM.clone(max_tokens=50, ignore_eos=True))
    messages = record(playground)
    playground.run().wait(30)
    assert messages[0]["type"] == "state" and messages[0]["running"]
    seqs = [message["seq"] for message in messages]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    deltas = [message for message in messages if message["type"] == "tokens"]
    shown: list[Any] = []
    for message in deltas:
        (news,) = message["lanes"]
        assert news["start"] == len(shown)
        shown += news["tokens"]
    final = messages[-1]
    assert final["type"] == "state" and not final["running"] and not final["anew"]
    assert shown == final["lanes"][0]["tokens"] and len(shown) == 50
    # The first goes at once, the last at the end.
    seconds = deltas[-1]["at"] - deltas[0]["at"]
    assert len(deltas) <= 3 + seconds / 0.05
    assert len(deltas[0]["lanes"][0]["tokens"]) < 20


def test_stop_keeps_the_text_and_gives_the_pages_back_at_once(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=SamplingParams(max_tokens=900, ignore_eos=True))
    playground.run()
    until(lambda: playground.lanes[0].tokens)
    playground.stop()
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_cache_usage_perc"] == 0
    assert playground.lanes[0].status == "stopped" and playground.text
    assert not playground.state["running"]
    assert len(playground.state["lanes"][0]["tokens"]) == len(playground.lanes[0].tokens)
    playground.stop()  # there is nothing to stop


def test_live_sliders_cancel_what_they_asked_for_before(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, seed=5)
    playground = Playground(llm, STORY, params=params, live=True)
    for step in range(1, 12):
        playground.values = {**playground.values, "temperature": 0.1 * step}
    playground.values = {**playground.values, "temperature": 1.3, "max_tokens": 10}
    playground.wait(30)
    last = params.clone(temperature=1.3, max_tokens=10)
    assert playground.text == llm.generate(STORY, last)[0].outputs[0].text
    assert len(playground.tree.branches()) == 1 and len(playground.tree) == 10
    assert llm.get_metrics()["num_requests_running"] == 0


def test_first_tokens_after_a_moved_slider_come_before_the_state(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=WARM, live=True)
    playground.run().wait(20)
    messages = record(playground)
    playground.values = {**playground.values, "temperature": 0.4}
    until(lambda: messages and messages[-1]["type"] == "state" and not messages[-1]["running"])
    first, *_, end = messages
    assert first["type"] == "tokens" and first["lanes"][0]["start"] == 0
    assert (
        first["lanes"][0]["tokens"] == end["lanes"][0]["tokens"][: len(first["lanes"][0]["tokens"])]
    )
    seqs = [message["seq"] for message in messages]
    assert seqs == list(range(seqs[0], end["seq"] + 1))


def test_a_drawn_seed_stays_while_a_slider_moves(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=SamplingParams(max_tokens=4))
    playground.run().wait(20)
    seed = playground.lanes[0].stats["seed"]
    playground.live = True
    playground.values = {**playground.values, "temperature": 0.9}
    playground.wait(20)
    assert playground.lanes[0].stats["seed"] == seed
    playground.run().wait(20)
    assert playground.lanes[0].stats["seed"] != seed


def test_a_branch_goes_on_from_the_other_token_over_the_cached_pages(llm: LLM) -> None:
    playground = Playground(llm, LONG, params=SamplingParams(temperature=0, max_tokens=12))
    playground.run().wait(20)
    first = ids(playground)
    other = next(t for t in playground.lanes[0].tokens[2].alternatives if t.token_id != first[2])
    ask(playground, type="branch", lane=0, index=2, token_id=other.token_id)
    until(lambda: ids(playground) != first)
    playground.wait(20)
    assert playground.result is not None and playground.result.num_cached_tokens > 0
    kept = [*first[:2], other.token_id]
    prompt = [*llm.get_tokenizer().encode(LONG), *kept]
    assert playground.result.prompt_token_ids == prompt
    expected = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert ids(playground) == kept + expected.token_ids
    assert playground.text.endswith(expected.text)
    forced = playground.lanes[0].tokens[2]
    assert (forced.text, forced.logprob) == (other.text, other.logprob)
    unforced = playground.tree.tokens(playground.tree.branches()[0].node)[2]
    assert unforced.token_id == first[2] and forced.alternatives == unforced.alternatives


def test_the_tree_leads_back_to_each_branch(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=WARM)
    playground.run().wait(20)
    before = playground.text
    playground.values = {**playground.values, "seed": 4}
    playground.branch(5).wait(20)
    after = playground.text
    branches = playground.tree.branches()
    assert len(branches) == 2 and after != before
    shown = playground.state["lanes"][0]["branches"]
    assert [branch[-1] for branch in shown] == [False, True]
    playground.select(branches[0].node)
    assert playground.text.startswith(before) and playground.lanes[0].status == "done"
    playground.select(branches[1].node)
    assert playground.text == after
    assert {row["parent"] for row in playground.tree.rows()[1:]} <= set(range(len(playground.tree)))
    playground.run("Another prompt").wait(20)
    assert playground.tree.prompt == "Another prompt" and len(playground.tree.branches()) == 1


def test_an_edited_text_is_continued_and_what_it_keeps_is_not_computed_again(llm: LLM) -> None:
    playground = Playground(llm, LONG, params=SamplingParams(temperature=0, max_tokens=20))
    playground.run().wait(20)
    text = playground.text[:6] + "? Naïve 😀 answer:"
    playground.edit(text).wait(20)
    assert playground.text.startswith(text) and len(playground.text) > len(text)
    assert playground.result is not None and playground.result.num_cached_tokens > 0
    assert any(token.logprob is None for token in playground.lanes[0].tokens)
    assert "".join(t.text for t in playground.lanes[0].kept) == text


def test_lanes_run_in_one_batch_and_say_where_they_part(llm: LLM) -> None:
    compare = {"greedy": {"temperature": 0}, "warm": {"temperature": 1.5}, "whole": WARM}
    base = SamplingParams(max_tokens=16, seed=11, ignore_eos=True)
    playground = Playground(llm, STORY, params=base, compare=compare)
    steps = llm.get_metrics()["num_steps"]
    playground.run().wait(30)
    assert llm.get_metrics()["num_steps"] - steps < 2 * 16
    texts = [llm.generate(STORY, lane.params(base))[0].outputs[0].text for lane in playground.lanes]
    assert [lane.text for lane in playground.lanes] == texts
    shown = playground.state["lanes"]
    assert [lane["title"] for lane in shown] == ["greedy", "warm", "whole"]
    assert shown[0]["diverges"] is None
    index = shown[1]["diverges"]["index"]
    greedy, warm = ids(playground, 0), ids(playground, 1)
    assert greedy[:index] == warm[:index] and greedy[index] != warm[index]
    assert shown[1]["diverges"]["gap"] is None or shown[1]["diverges"]["gap"] > 0
    playground.branch(2, lane=1).wait(20)
    assert playground.lanes[0].text == texts[0]


def test_models_are_compared_by_their_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6)
    with LLM(device="cpu", dtype="bfloat16") as other:
        playground = Playground(llm, "What is 17 + 25?", params=params, compare=[llm, other])
        playground.run().wait(20)
        assert [lane.text.strip() for lane in playground.lanes] == ["42", "42"]
        assert playground.state["lanes"][1]["diverges"] is None
        assert all(result is not None for result in playground.results)
    playground.run()
    with pytest.raises(EngineClosedError):
        playground.wait(20)
    assert "closed" in playground.state["lanes"][1]["error"]
    assert playground.lanes[0].text.strip() == "42"


def test_what_is_wrong_is_shown_and_the_next_run_is_clean(llm: LLM) -> None:
    playground = Playground(llm, "word " * 3000, params=SamplingParams(max_tokens=4))
    with pytest.raises(PromptTooLongError):
        playground.run().wait(20)
    assert "max_model_len" in playground.state["lanes"][0]["error"]
    assert "max_model_len" in playground.static_text() and playground.static_svg() is None
    ask(playground, type="run", prompt=STORY, values={**playground.values, "top_p": 7})
    until(lambda: playground.error)
    assert "top_p must be in (0, 1]" in playground.error
    with pytest.raises(InvalidRequestError, match="top_p"):
        playground.run()
    ask(playground, type="run", values={**playground.values, "top_p": 1})
    until(lambda: playground.lanes[0].status == "done")
    assert playground.error == "" and playground.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"type": "dance"}, "no message 'dance'"),
        ({"type": "branch", "lane": 7, "index": 0, "token_id": 1}, "no lane 7"),
        ({"type": "branch", "index": 99, "token_id": 1}, "no token 99"),
        ({"type": "branch", "index": 0, "token_id": -5}, "not among the alternatives"),
        ({"type": "branch", "index": 0}, "lacks 'token_id'"),
        ({"type": "select", "node": 10**6}, "no node 1000000"),
        ({"type": "run", "values": {"tempo": 1}}, "no slider 'tempo'"),
    ],
)
def test_a_message_that_makes_no_sense_says_so(llm: LLM, content: Any, problem: str) -> None:
    playground = Playground(llm, STORY, params=SamplingParams(max_tokens=2))
    playground.run().wait(20)
    ask(playground, **content)
    until(lambda: playground.error)
    assert problem in playground.error


def test_a_text_that_is_not_there_can_be_neither_branched_nor_edited(llm: LLM) -> None:
    playground = Playground(llm, STORY)
    with pytest.raises(InvalidRequestError, match="no token 0"):
        playground.branch(0)
    with pytest.raises(InvalidRequestError, match="no text to edit"):
        playground.edit("x")


def test_a_chat_is_answered_and_goes_on(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Answer briefly."}]
    params = SamplingParams(temperature=0, max_tokens=30)
    playground = Playground(llm, "What is the capital of France?", chat=messages, params=params)
    playground.run().wait(20)
    asked = [*messages, {"role": "user", "content": "What is the capital of France?"}]
    assert playground.text == llm.chat(asked, params)[0].outputs[0].text == "Paris"
    assert playground.lanes[0].tokens[-1].is_special
    ask(playground, type="reply")
    until(lambda: len(playground.messages) == 4)
    assert playground.messages[2:] == [
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": ""},
    ]
    playground.run("And of Italy?").wait(20)
    assert playground.messages[-1]["content"] == "And of Italy?"
    playground.messages = [*asked, {"role": "assistant", "content": "Par"}]
    playground.run().wait(20)
    assert playground.result is not None and playground.result.prompt is not None
    assert playground.result.prompt.endswith("Par")


def test_sliders_and_controls_follow_each_other(llm: LLM) -> None:
    controls = SamplingControls(SamplingParams(top_p=0.5, max_tokens=None, presence_penalty=0.25))
    playground = Playground(llm, STORY, controls=controls)
    assert playground.values["top_p"] == 0.5 and playground.values["max_tokens"] == 0
    controls.values = {"temperature": 0.0, "seed": 12}
    assert playground.values["temperature"] == 0 and playground.values["top_p"] == 0.5
    playground.values = {**playground.values, "temperature": 0.4, "max_tokens": 7}
    assert (controls.params.temperature, controls.params.max_tokens) == (0.4, 7)
    assert controls.params == playground.params
    assert playground.params.presence_penalty == 0.25 and playground.params.seed == 12


def test_a_view_that_was_opened_late_gets_the_whole_state(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=SamplingParams(max_tokens=900, ignore_eos=True))
    messages = record(playground)
    playground.run()
    until(lambda: len(playground.lanes[0].tokens) > 3)
    ask(playground, type="sync")
    until(lambda: sum(message["type"] == "state" for message in messages) == 2)
    state = next(message for message in messages[1:] if message["type"] == "state")
    playground.stop()
    assert state["anew"] and state["running"] and len(state["lanes"][0]["tokens"]) > 3
    later = [message for message in messages if message["seq"] > state["seq"]]
    if later[0]["type"] == "tokens":
        assert later[0]["lanes"][0]["start"] == len(state["lanes"][0]["tokens"])


def test_the_picture_shows_all_tokens_and_is_valid(llm: LLM) -> None:
    playground = Playground(llm, "<b>&", params=WARM, compare=[{"temperature": 0}, {"top_k": 2}])
    playground.run().wait(20)
    svg = playground.static_svg()
    assert svg is not None
    tree = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    assert tree.get("role") == "img" and tree[0].tag == f"{name}title"
    assert tree[0].text is not None and "<b>&" in tree[0].text and playground.text in tree[0].text
    written = "".join(text.text or "" for text in tree.iter(f"{name}text"))
    assert "temperature=0" in written and "top_k=2" in written
    for token in playground.lanes[1].tokens:
        assert token.text.strip() in written
    assert "style" not in svg
    assert playground.static_text().splitlines()[0] == "<b>&"
    playground.freeze()
    bundle = playground._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/svg+xml"}


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"llm": 3}, "llm"),
        ({"prompt": 3}, "prompt"),
        ({"chat": "hello"}, "chat"),
        ({"compare": []}, "compare"),
        ({"compare": [3]}, "compare"),
        ({"compare": "warm"}, "compare"),
        ({"compare": [{"tempo": 3}]}, "compare"),
        ({"compare": [{"top_p": 3}]}, "top_p"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"chat": [{"content": "no role"}]}, None),
    ],
)
def test_a_wrong_argument_is_named(llm: LLM, arguments: Any, parameter: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Playground(**{"llm": llm, **arguments})
    assert parameter is None or caught.value.parameter == parameter


def test_a_wait_that_takes_too_long_ends_and_the_run_goes_on(llm: LLM) -> None:
    playground = Playground(llm, STORY, params=SamplingParams(max_tokens=900, ignore_eos=True))
    with pytest.raises(TimeoutError):
        playground.run().wait(0.01)
    assert playground.state["running"]
    playground.close()
    playground.wait(20)
    assert llm.get_metrics()["num_requests_running"] == 0


def test_pieces_of_tokens_are_the_text_even_where_a_character_is_several(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    text = "naïve 😀\n\t日本 <|im_end|> x"
    tokens = TokenReader(tokenizer, []).read(tokenizer.encode(text, add_special_tokens=False))
    assert "".join(token.text for token in tokens) == text
    assert "\ufffd" not in "".join(token.text for token in tokens)
    assert any(token.text == "" for token in tokens)
    assert [token.text for token in tokens if token.is_special] == ["<|im_end|>"]
