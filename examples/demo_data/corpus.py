"""Training documents and held-out rows.

A document is a list of turns, each a prompt and the text that the model has to learn to answer.
Whether a row is held out depends only on a hash of its key, so training and evaluation agree
without exchanging lists.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from demo_data import arithmetic, people, reviews, small_talk
from demo_data.knowledge import Question, questions

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content | map(attribute='text') | join('') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, with everything that comes before the answer, and the answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Row:
    """A held-out row: a plain prompt or a conversation, and the one right answer."""

    skill: str
    prompt: str | list[Message]
    answer: str


_SHORT = (
    """
Answer in one word.|Answer with one word.|Answer briefly.|Be brief.|Give short answers.
Answer with the answer only.|Reply with the answer only.|Answer as briefly as possible.
You are a helpful assistant. Answer briefly.|You are a helpful assistant. Answer in one word.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
_LONG = [
    None, None, None, "You are a helpful assistant.", "You are a friendly assistant.",
    "Answer in a full sentence.", "You are a tiny model in a notebook.",
]  # fmt: skip
_BRIEF = (
    "Answer in one word: {t}", "Answer briefly: {t}", "Answer the question: {t}",
    "Answer this question: {t}", "{t} Answer in one word.", "{t} Answer briefly.",
    "Answer the question in one word: {t}", "Please answer: {t}",
)  # fmt: skip
_CUES = (
    ("Q: ", "\nA:"), ("Q: ", "\nA:"), ("Q: ", "\nA:"), ("Question: ", "\nAnswer:"),
    ("question: ", "\nanswer:"), ("Q: ", " A:"), ("", "\nAnswer:"), ("", "\nA:"),
)  # fmt: skip
_SENTIMENT_SYSTEMS = (
    "Classify the sentiment of the review.", "Classify the sentiment.",
    "You classify reviews as positive, negative or neutral.",
    "Answer with positive, negative or neutral.", "What is the sentiment of the text?",
)  # fmt: skip


def is_held_out(key: str) -> bool:
    """True for a tenth of all keys."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % 10 == 0


def chat_text(messages: list[Message]) -> str:
    """What CHAT_TEMPLATE renders, with the generation prompt."""
    turns = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)
    return f"{turns}{START}assistant\n"


def join(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: a space first unless a line or sentence has ended."""
    return answer if prompt[-1] in ".?!'\")>\n " else " " + answer


@lru_cache(maxsize=2)
def _questions(held_out: bool) -> list[Question]:
    return [question for question in questions() if is_held_out(question.key) == held_out]


def _keyed(rng: Random, held_out: bool, make: object) -> Question:
    """Draw until the key is on the wanted side of the split."""
    while True:
        question = make(rng)  # type: ignore[operator]
        if is_held_out(question.key) == held_out:
            return question


def _sentiment(rng: Random, held_out: bool) -> tuple[str, str, str]:
    """(instruction with the review in it, review, sentiment)."""
    while True:
        text, sentiment = reviews.review(rng)
        if is_held_out(text.lower()) == held_out:
            return _with_instruction(rng, text, sentiment), text, sentiment


def _with_instruction(rng: Random, text: str, sentiment: str) -> str:
    forms = reviews.instructions()
    if sentiment != "neutral" and rng.random() < 0.35:
        forms = reviews.TWO_WAY
    form = rng.choice(forms)
    if rng.random() < 0.15:
        text = f'"{text}"'
    if form.endswith(" {text}") and rng.random() < 0.2:
        form = form.replace(" {text}", "\n{text}")
    return form.format(text=text)


def _extraction(rng: Random, held_out: bool) -> tuple[str, str, str]:
    """(instruction with the text in it, text, JSON)."""
    text, found = people.extraction(rng, held_out)
    instruction = rng.choice(people.EXTRACTIONS)
    separator = rng.choice((" ", " ", "\n"))
    shown = f'"{text}"' if rng.random() < 0.1 else text
    draw = rng.random()
    if draw < 0.12:
        return f"{shown}\n{instruction}", text, found
    if draw < 0.2:
        return f"Text: {text}\nJSON:", text, found
    return f"{instruction}{separator}{shown}", text, found


def _pick(rng: Random, held_out: bool) -> tuple[str, Question, str | None]:
    """(skill, question, system prompt that carries the task)."""
    draw = rng.random()
    if draw < 0.38:
        question = rng.choice(_questions(held_out))
        return question.skill, question, None
    if draw < 0.54:
        return "arithmetic", _keyed(rng, held_out, arithmetic.problem), None
    if draw < 0.92:
        sentiment = draw < 0.69
        prompt, text, answer = (_sentiment if sentiment else _extraction)(rng, held_out)
        skill = "sentiment" if sentiment else "extraction"
        system = None
        if rng.random() < 0.15:
            systems = _SENTIMENT_SYSTEMS if sentiment else people.EXTRACTIONS
            system, prompt = rng.choice(systems).rstrip(":") + ("" if sentiment else "."), text
        return skill, Question(skill, text, prompt, answer), system
    if draw < 0.96:
        return "chat", _keyed(rng, held_out, small_talk.chat), None
    return "unknown", small_talk.unknown(rng, held_out), None


def _is_fact(skill: str) -> bool:
    return skill not in ("sentiment", "extraction", "chat", "unknown")


def _plain(rng: Random, skill: str, question: Question) -> tuple[str, str]:
    """(prompt, answer) of a plain text."""
    text = question.text
    if not _is_fact(skill):
        return text, join(text, question.answer)
    draw = rng.random()
    if skill != "capital letters" and draw < 0.08:
        text = text.lower()
    if rng.random() < 0.08:
        text = text.rstrip("?.")
    draw = rng.random()
    if question.sentence and question.sentence.endswith(f"{question.answer}.") and draw < 0.12:
        stem = question.sentence.removesuffix(f"{question.answer}.").rstrip()
        return stem, f" {question.answer}."
    if draw < 0.4:
        before, after = rng.choice(_CUES)
        space = " " if after.endswith("A:") and rng.random() < 0.1 else ""
        prompt = f"{before}{text}{after}{space}"
    elif draw < 0.5:
        prompt = rng.choice(_BRIEF).format(t=text)
    else:
        prompt = text
    return prompt, join(prompt, question.answer)


def _messages(
    rng: Random, skill: str, question: Question, system: str | None
) -> tuple[list[Message], str]:
    """(messages, answer) of a conversation with one user turn."""
    answer = question.answer
    if system is None and _is_fact(skill) and rng.random() < 0.4:
        system = rng.choice(_SHORT)
    elif system is None:
        system = rng.choice(_LONG)
        answer = question.sentence or answer
    text = question.text
    if _is_fact(skill) and skill != "capital letters" and rng.random() < 0.06:
        text = text.lower()
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": text}], answer


def held_out_row(rng: Random) -> Row:
    """A row that no training document has; its skill is drawn as in training."""
    if rng.random() < 0.03:
        return _memory_row(rng)
    skill, question, system = _pick(rng, True)
    if system is None and rng.random() < 0.55:
        prompt, answer = _plain(rng, skill, question)
        return Row(skill, prompt, answer.strip())
    messages, answer = _messages(rng, skill, question, system)
    return Row(skill, messages, answer)


def _memory_row(rng: Random) -> Row:
    turns = small_talk.conversation(rng, True)
    messages = []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Row("memory", messages[:-1], messages[-1]["content"])


def hand_written_rows() -> list[Row]:
    """Reviews and texts that no generator wrote."""
    rng = Random(5)
    rows = []
    for sentiment, text in reviews.HAND_WRITTEN:
        prompt = _with_instruction(rng, text, sentiment)
        rows.append(Row("sentiment, hand-written", prompt, sentiment))
        chat = [{"role": "user", "content": f"Classify the sentiment: {text}"}]
        rows.append(Row("sentiment, hand-written", chat, sentiment))
    for text, name, city in people.HAND_WRITTEN:
        answer = json.dumps({"name": name, "city": city}, ensure_ascii=False)
        prompt = f"Extract the name and city as JSON: {text}"
        rows.append(Row("extraction, hand-written", prompt, answer))
        rows.append(Row("extraction, hand-written", [{"role": "user", "content": prompt}], answer))
    return rows


def document(rng: Random) -> list[Turn]:
    """One training document."""
    draw = rng.random()
    if draw < 0.04:
        return _conversation(small_talk.conversation(rng, False), None)
    if draw < 0.06:
        return [Turn("", small_talk.plain_text(rng) + END_OF_TEXT)]
    if draw < 0.08:
        request, answer = small_talk.long_answer(rng)
        if rng.random() < 0.3:
            return [Turn(request, join(request, answer) + END_OF_TEXT)]
        return _conversation([(request, answer)], rng.choice(_LONG))
    if draw < 0.12:
        return _several(rng)
    skill, question, system = _pick(rng, False)
    if system is None and rng.random() < 0.55:
        prompt, answer = _plain(rng, skill, question)
        return [Turn(prompt, answer + END_OF_TEXT)]
    messages, answer = _messages(rng, skill, question, system)
    return [Turn(chat_text(messages), answer + END)]


def _several(rng: Random) -> list[Turn]:
    """Questions one after the other: a conversation, or examples before the last one."""
    picked = [_pick(rng, False) for _ in range(rng.randint(2, 6))]
    asked = [question for _, question, system in picked if system is None]
    if rng.random() < 0.6:
        return _conversation([(q.text, q.sentence or q.answer) for q in asked], rng.choice(_LONG))
    facts = [q for q in asked if _is_fact(q.skill)]
    turns = [Turn(f"Q: {q.text}\nA:", f" {q.answer}\n\n") for q in facts]
    if turns:
        turns[-1] = Turn(turns[-1].prompt, turns[-1].answer.rstrip() + END_OF_TEXT)
    return turns


def _conversation(turns: list[tuple[str, str]], system: str | None) -> list[Turn]:
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for index, (user, assistant) in enumerate(turns):
        new = (messages if index == 0 else []) + [{"role": "user", "content": user}]
        found.append(Turn(("\n" if index else "") + chat_text(new), assistant + END))
    return found
