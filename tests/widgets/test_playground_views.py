"""Playground's view in a browser, with the state and the messages of a real playground."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbllm import LLM, SamplingParams
from nbllm.widgets.playground import Playground

RunView = Callable[..., Any]

# Of what is on the page: the tokens, as texts.
HELPERS = """
const all = (selector) => [...el.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((one) => one.textContent);
const button = (text) => all("button").find((one) => one.textContent === text);
const tokens = () => all(".nbllm-token");
const key = (one, name, options = {}) => fire(one, "keydown", { key: name, ...options });
const active = () => document.activeElement;
"""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def story(llm: LLM) -> Playground:
    """A text with a branch of its own."""
    params = SamplingParams(temperature=1.3, max_tokens=14, seed=3)
    playground = Playground(llm, "Once upon a time", params=params)
    playground.run().wait(20)
    playground.values = {**playground.values, "seed": 4}
    return playground.branch(4).wait(20)


def test_alternatives_come_by_pointer_and_by_key_and_lead_to_branches(
    run_view: RunView, story: Playground
) -> None:
    seen = run_view(
        story,
        HELPERS
        + """
        const popup = el.querySelector(".nbllm-alternatives");
        const isOpen = () => popup.matches(":popover-open");
        const seen = { texts: texts(".nbllm-token"), before: isOpen() };
        fire(tokens()[3], "pointerover");
        seen.hovered = [isOpen(), texts(".nbllm-piece"), texts(".nbllm-p")];
        fire(el.querySelector(".nbllm-token-view"), "pointerleave");
        await waitFor(() => !isOpen());
        seen.stops = tokens().filter((one) => one.tabIndex === 0).length;
        tokens()[0].focus();
        key(active(), "ArrowRight"); key(active(), "ArrowRight"); key(active(), "ArrowLeft");
        seen.at = tokens().indexOf(active());
        seen.label = active().getAttribute("aria-label");
        seen.focused = isOpen();
        key(active(), "End"); seen.last = tokens().indexOf(active());
        key(active(), "ArrowRight"); seen.after = tokens().indexOf(active());
        key(active(), "Home"); key(active(), "ArrowRight");
        key(active(), "Enter"); key(active(), "ArrowDown");
        seen.chosen = active().textContent;
        key(active(), "Escape");
        seen.back = [tokens().indexOf(active()), isOpen(), sent.length];
        key(active(), "Enter"); key(active(), "ArrowDown"); active().click();
        tokens()[5].click();
        return { ...seen, closed: !isOpen(), sent };
        """,
    )
    shown = story.lanes[0].tokens
    assert "".join(seen["texts"]) == story.text and not seen["before"]
    is_open, pieces, percents = seen["hovered"]
    assert is_open and pieces == [other.text for other in shown[3].alternatives]
    assert len(percents) == 5 and all(percent.endswith(" %") for percent in percents)
    assert seen["stops"] == 1 and seen["at"] == 1 and seen["focused"]
    assert seen["label"].startswith(shown[1].text) and seen["label"].endswith(" %")
    assert seen["last"] == seen["after"] == len(shown) - 1
    second = shown[1].alternatives[1]
    assert seen["chosen"].startswith(second.text)
    assert seen["back"] == [1, False, 0] and seen["closed"]
    assert seen["sent"] == [
        {"type": "branch", "lane": 0, "index": 1, "token_id": second.token_id},
        {"type": "branch", "lane": 0, "index": 5, "token_id": shown[5].token_id},
    ]


def test_tokens_come_in_order_and_a_gap_is_healed_by_the_state(run_view: RunView, llm: LLM) -> None:
    playground = Playground(llm, "Once upon a time", params=SamplingParams(seed=3, max_tokens=20))
    before, flow = playground.get_state(), []

    def publish(kind: str, data: Any = None, *args: Any, **options: Any) -> None:
        if data and data.get("method") == "custom":
            flow.append({"message": data["content"]})
        elif data and "state" in data.get("state", {}):
            flow.append({"state": data["state"]["state"]})

    playground.comm.publish_msg = publish
    playground.run().wait(20)
    seen = run_view(
        playground,
        HELPERS
        + """
        const play = ({ message: content, state: now }) =>
          content ? message(content) : change({ state: now });
        const text = () => texts(".nbllm-token").join("");
        const { flow } = state;
        flow.slice(0, -1).forEach(play);
        const streamed = text();
        const spans = tokens();
        play(flow.at(-1));
        const isKept = tokens().every((one, index) => one === spans[index]);
        const spoken = el.querySelector("[aria-live=polite]").textContent;
        // Another run: the first message overtakes the state, the second is lost, the third comes
        // twice.
        const seq = flow.at(-1).state.seq;
        const moved = flow.map((one) => structuredClone(one));
        moved.forEach((one) => ((one.message ?? one.state).seq += seq + 1));
        const overtakes = moved[0];
        play({ state: { ...overtakes.state, seq: overtakes.state.seq - 1 } });
        const stale = [text(), el.querySelector(".nbllm-stale") !== null, button("Stop").disabled];
        play(moved[1]);
        const early = text();
        play(overtakes);
        const started = [text(), el.querySelector(".nbllm-stale") !== null];
        play(moved[3]); play(moved[3]); play(moved[1]);
        await waitFor(() => sent.length);
        const gap = [text(), structuredClone(sent)];
        const whole = { ...moved.at(-1).state, anew: true, running: true, seq: 3 * seq };
        change({ state: whole });
        return { streamed, isKept, spoken, stale, early, started, gap, healed: text() };
        """,
        state=before["state"],
        flow=flow,
    )
    assert len(flow) >= 5
    assert seen["streamed"] == seen["healed"] == seen["spoken"] == playground.text
    assert seen["isKept"]  # what has the focus keeps it
    assert seen["stale"] == [playground.text, True, False]
    assert seen["early"] == playground.text
    first = "".join(token[0] for token in flow[1]["message"]["lanes"][0]["tokens"])
    assert seen["started"] == [first, False]
    assert seen["gap"] == [first, [{"type": "sync"}]]


def test_what_is_shown_is_run_and_everything_has_its_key(
    run_view: RunView, story: Playground
) -> None:
    seen = run_view(
        story,
        HELPERS
        + """
        const seen = {};
        const area = el.querySelector("[aria-label=prompt]");
        area.value = "Hello"; fire(area, "input");
        const slider = el.querySelector("[name=temperature]");
        slider.value = 0; fire(slider, "input");
        seen.saved = saved.map((one) => one.values.temperature);
        seen.idle = all("input:disabled").map((one) => one.name);
        slider.value = 0.5; fire(slider, "input");
        const seed = el.querySelector("[name=seed]");
        seed.value = ""; fire(seed, "input");
        key(area, "Enter", { ctrlKey: true });
        key(area, "Escape"); // nothing runs
        change({ state: { ...state.state, running: true, anew: false, seq: state.state.seq + 1 } });
        key(area, "Escape");
        change({ error: "top_p is wrong" });
        seen.error = texts("[role=alert]").join("");
        el.querySelectorAll("input[type=checkbox]")[1].click();
        seen.numbers = [el.querySelectorAll(".nbllm-numeric").length, tokens()[2].dataset.p];
        seen.branches = texts(".nbllm-branch");
        all(".nbllm-branch")[0].click();
        button("Edit text").click();
        const editor = el.querySelector("[aria-label='new text']");
        seen.editor = [editor.value, active() === editor, editor.checkVisibility()];
        editor.value = "Hello you";
        key(editor, "Enter", { metaKey: true });
        seen.closed = !editor.checkVisibility();
        seen.shortcuts = all("[data-lm-suppress-shortcuts] .nbllm-token").length > 0;
        seen.nameless = all("input, textarea, select").filter(
          (one) => !one.closest("label") && !one.getAttribute("aria-label")).length;
        seen.ids = all("[id]").length;
        cleanup();
        return { ...seen, sent, left: el.children.length,
          listeners: Object.values(listeners).flat().length };
        """,
    )
    assert seen["saved"] == [0]
    assert seen["idle"] == ["top_p", "min_p", "top_k", "seed"]
    run, stop, select, edit = seen["sent"]
    assert run["type"] == "run" and run["prompt"] == "Hello"
    assert run["values"] == {**story.values, "temperature": 0.5, "seed": None}
    assert stop == {"type": "stop"}
    first = story.tree.branches()[0]
    assert select == {"type": "select", "lane": 0, "node": first.node}
    assert edit == {"type": "edit", "lane": 0, "text": "Hello you"}
    assert seen["editor"] == [story.text, True, True] and seen["closed"]
    assert seen["error"] == "top_p is wrong"
    assert seen["numbers"][0] == 1 and seen["numbers"][1].endswith(" %")
    assert len(seen["branches"]) == 2 and first.text[:20] in seen["branches"][0]
    assert seen["shortcuts"] and seen["nameless"] == seen["ids"] == 0
    assert seen["left"] == seen["listeners"] == 0


def test_lanes_show_where_they_part_and_a_chat_can_be_written(run_view: RunView, llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, seed=11, ignore_eos=True)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    compare = [{"temperature": 0}, {"temperature": 1.6}]
    playground = Playground(llm, chat=chat, params=params, compare=compare)
    playground.run().wait(20)
    seen = run_view(
        playground,
        HELPERS
        + """
        const seen = { titles: texts("section strong"), gaps: texts(".nbllm-gap") };
        const parted = (lane) => all(`section:nth-child(${lane}) .nbllm-token`).map(
          (one) => [one.matches(".nbllm-parted"), one.matches(".nbllm-parting")]);
        seen.parted = [parted(1), parted(2)];
        seen.special = texts(".nbllm-special");
        button("Reply").click();
        button("+ message").click();
        const areas = all(".nbllm-message textarea");
        areas.at(-1).value = "And you?"; fire(areas.at(-1), "input");
        const role = all(".nbllm-message select").at(-1);
        role.value = "assistant"; fire(role, "input");
        all("[aria-label='remove message']")[0].click();
        button("Run").click();
        change({ messages: [{ role: "tool", content: "4" }] });
        seen.now = [all("select").map((one) => one.value), all(".nbllm-message textarea")[0].value];
        return { ...seen, sent };
        """,
    )
    index = playground.state["lanes"][1]["diverges"]["index"]
    assert seen["titles"] == ["temperature=0", "temperature=1.6"]
    assert seen["gaps"][0] == "" and seen["gaps"][1].startswith(f"differs from token {index + 1}")
    assert not any(parted or parting for parted, parting in seen["parted"][0])
    assert seen["parted"][1] == [[at >= index, at == index] for at in range(10)]
    assert [message["type"] for message in seen["sent"]] == ["reply", "run"]
    assert seen["sent"][1]["messages"] == [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "And you?"},
    ]
    assert seen["now"] == [["tool"], "4"]
