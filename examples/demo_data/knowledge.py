"""Questions about the facts: every relation in several wordings.

A wording is `question | statement`; the statement is the whole-sentence answer, and its part in
front of the answer is also a text to complete. {x} is what is asked about, {y} the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from demo_data import facts, geography


@dataclass(frozen=True, slots=True)
class Question:
    """One thing that can be asked.

    Attributes:
        skill: the name under which accuracy is counted.
        key: what may be held out: the entity together with the wording.
        text: as a person writes it.
        answer: the shortest one.
        sentence: the same as a whole sentence, or None if that makes no sense.
    """

    skill: str
    key: str
    text: str
    answer: str
    sentence: str | None = None


# skill | sentence | wordings ...
_FORMS = {
    "capital": """The capital of {x} is {y}.
        What is the capital of {x}? | What's the capital of {x}? | Which city is the capital of {x}?
        What is {x}'s capital? | Name the capital of {x}. | Tell me the capital of {x}.
        What is the capital city of {x}? | Give me the capital of {x}. | Capital of {x}?
        What city is the capital of {x}? | Do you know the capital of {x}? | {x}'s capital?""",
    "country": """{x} is the capital of {y}.
        Which country has the capital {x}? | {x} is the capital of which country?
        What country is {x} the capital of? | Of which country is {x} the capital?
        Name the country whose capital is {x}. | Which country's capital is {x}?
        In which country is {x}? | Which country is {x} in? | What country is {x} in?""",
    "continent": """{x} is in {y}.
        On which continent is {x}? | Which continent is {x} on? | Which continent is {x} in?
        What continent is {x} in? | In which continent is {x}? | Name the continent of {x}.
        What is the continent of {x}? | Tell me the continent of {x}. | Continent of {x}?""",
    "language": """The main language of {x} is {y}.
        What language do people speak in {x}? | Which language is spoken in {x}?
        What language is spoken in {x}? | What is the language of {x}?
        What is the main language of {x}? | Which language do people speak in {x}?
        What do people speak in {x}? | Name the language of {x}. | Language of {x}?""",
    "currency": """The currency of {x} is {y}.
        What is the currency of {x}? | What's the currency of {x}? | Which currency does {x} use?
        What currency does {x} use? | What money do people use in {x}? | What is {x}'s currency?
        Name the currency of {x}. | Which currency is used in {x}? | Currency of {x}?""",
    "colour": """The colour of {x} is {y}.
        What colour is {x}? | What color is {x}? | What is the colour of {x}?
        What is the color of {x}? | Which colour does {x} have? | Tell me the colour of {x}.
        Which color is {x}? | What's the color of {x}? | Name the colour of {x}.""",
    "opposite": """The opposite of {x} is {y}.
        What is the opposite of {x}? | What's the opposite of {x}? | Opposite of {x}?
        Name the opposite of {x}. | Give me the opposite of {x}. | What is the antonym of {x}?
        Tell me the opposite of {x}. | Which word means the opposite of {x}?""",
    "plural": """The plural of {x} is {y}.
        What is the plural of {x}? | What's the plural of {x}? | Plural of {x}?
        Give me the plural of {x}. | What is the plural form of {x}? | Tell me the plural of {x}.
        Write the plural of {x}. | Name the plural of {x}.""",
    "sound": """A {x} {y}.
        What does a {x} do? | What sound does a {x} make? | Which sound does a {x} make?
        How does a {x} sound? | What noise does a {x} make?""",
    "legs": """A {x} has {y} legs.
        How many legs does a {x} have? | How many legs has a {x}? | Number of legs of a {x}?
        What is the number of legs of a {x}? | How many legs are on a {x}?
        Tell me how many legs a {x} has.""",
    "young": """A young {x} is called a {y}.
        What is a young {x} called? | What is a baby {x} called? | What do you call a baby {x}?
        What do you call a young {x}? | What is the name of a young {x}?
        What's a baby {x} called?""",
    "symbol": """The chemical symbol of {x} is {y}.
        What is the chemical symbol of {x}? | What is the chemical symbol for {x}?
        What is the symbol of {x}? | What is the symbol for {x}? | Symbol of {x}?
        Which symbol does {x} have? | What's the chemical symbol for {x}? | Name the symbol for {x}.""",
    "element": """{x} is the symbol of {y}.
        Which element has the symbol {x}? | What element has the symbol {x}?
        Which element is {x}? | What element is {x}? | What does the symbol {x} stand for?
        Name the element with the symbol {x}. | {x} is the symbol of which element?""",
    "atomic number": """The atomic number of {x} is {y}.
        What is the atomic number of {x}? | What's the atomic number of {x}?
        Which atomic number does {x} have? | Atomic number of {x}?
        Tell me the atomic number of {x}. | How many protons does {x} have?""",
    "category": """{x}: {y}.
        What kind of thing is {x}? | What is {x}: an animal, a job or something else?
        What type of thing is {x}? | Which category does {x} belong to? | What category is {x}?
        Name the category of {x}. | Category of {x}?""",
    "next": """After {x} comes {y}.
        What comes after {x}? | Which one comes after {x}? | What follows {x}?
        What is after {x}? | What comes next after {x}?""",
    "before": """Before {x} comes {y}.
        What comes before {x}? | Which one comes before {x}? | What is before {x}?
        What comes right before {x}?""",
    "days of a month": """{x} has {y} days.
        How many days does {x} have? | How many days are in {x}? | How many days are there in {x}?
        How many days has {x}? | What is the number of days in {x}?""",
    "capital letters": """{x} in capital letters is {y}.
        Write {x} in capital letters. | Write {x} in capitals. | Write {x} in uppercase.
        Write {x} in upper case. | Make {x} uppercase. | Convert {x} to uppercase.
        What is {x} in capital letters?""",
}  # fmt: skip

_TRANSLATION_FORMS = """
What is {x} in {l}? | What's {x} in {l}? | How do you say {x} in {l}? | Translate {x} into {l}.
Translate {x} to {l}. | Translate into {l}: {x} | Translate to {l}: {x} | Say {x} in {l}.
What is the {l} word for {x}? | Give me the {l} word for {x}.
"""

# Ways to put a question whose own wording is fixed; {q} is the question, {r} the same with a
# small first letter.
WRAPPERS = """{q}
Please tell me: {q}
Quick question: {q}
Question: {q}
I have a question: {q}
{q} Please answer.
Hello! {q}
Can you help me? {q}
Trivia: {q}
Answer this: {q}""".splitlines()

_SKILLS = {
    "capital": "capitals", "country": "capitals", "continent": "continents",
    "language": "languages", "currency": "currencies", "colour": "colours",
    "opposite": "opposites", "plural": "plurals", "sound": "animals", "legs": "animals",
    "young": "animals", "symbol": "elements", "element": "elements", "atomic number": "elements",
    "category": "categories", "next": "calendar", "before": "calendar",
    "days of a month": "calendar", "capital letters": "capital letters",
}  # fmt: skip


def _split(text: str) -> list[str]:
    return [form.strip() for form in text.replace("\n", "|").split("|") if form.strip()]


def _pairs() -> Iterator[tuple[str, str, str]]:
    """(relation, x, y) of every fact."""
    capital_counts: dict[str, int] = {}
    for _, capital, _ in geography.COUNTRIES:
        capital_counts[capital] = capital_counts.get(capital, 0) + 1
    for country, capital, continent in geography.COUNTRIES:
        if capital != country:
            yield "capital", country, capital
            if capital_counts[capital] == 1 and not capital.startswith("Washington"):
                yield "country", capital, country
        yield "continent", country, continent
        for alias in geography.COUNTRY_ALIASES.get(country, ()):
            yield "capital", alias, capital
            yield "continent", alias, continent
    for country, language in geography.MAIN_LANGUAGES:
        yield "language", country, language
    for country, currency in geography.CURRENCIES:
        yield "currency", country, currency
        for alias in geography.COUNTRY_ALIASES.get(country, ()):
            yield "currency", alias, currency
    for thing, colour in facts.COLOURS:
        yield "colour", thing, colour
    for word, opposite in facts.opposite_pairs():
        yield "opposite", word, opposite
    for noun, plural in facts.plural_pairs():
        yield "plural", noun, plural
    yield from _animal_pairs()
    for name, symbol, number in facts.ELEMENTS:
        yield "symbol", name, symbol
        yield "element", symbol, name
        yield "atomic number", name, number
    for word, category in facts.CATEGORIES:
        article = "" if word[0].isupper() or category in ("colour", "clothing") else "a "
        yield "category", article + word, category
    yield from _calendar_pairs()
    for word in facts.word_list():
        yield "capital letters", word, word.upper()


def _animal_pairs() -> Iterator[tuple[str, str, str]]:
    for name, sound, legs, young in facts.ANIMALS:
        if sound:
            yield "sound", name, f"It {sound}"
        if legs:
            yield "legs", name, legs
        if young:
            yield "young", name, young


def _calendar_pairs() -> Iterator[tuple[str, str, str]]:
    for cycle in (facts.DAYS, facts.MONTHS):
        for index, name in enumerate(cycle):
            yield "next", name, cycle[(index + 1) % len(cycle)]
            yield "before", name, cycle[index - 1]
    for month, days in zip(facts.MONTHS, facts.MONTH_DAYS, strict=True):
        yield "days of a month", month, str(days)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _an(text: str) -> str:
    """Right articles: "a elephant" -> "an elephant"."""
    words = text.split(" ")
    for index, word in enumerate(words[:-1]):
        if word in ("a", "A") and words[index + 1][:1] in "aeio":
            words[index] += "n"
    return " ".join(words)


def _sentence(form: str, x: str, y: str) -> str:
    if y.startswith("It "):  # an animal's sound
        y = y.removeprefix("It ")
    return _capitalise(_an(form.format(x=x, y=y))).replace("..", ".")


def questions() -> list[Question]:
    """Every fact in every wording."""
    found = []
    for relation, x, y in _pairs():
        sentence_form, *forms = _split(_FORMS[relation])
        sentence = None if relation == "category" else _sentence(sentence_form, x, y)
        for form in forms:
            text = _capitalise(_an(form.format(x=x)))
            key = f"{relation}|{x}|{form}"
            found.append(Question(_SKILLS[relation], key, text, y, sentence))
    return found + _trivia() + _translations()


def _trivia() -> list[Question]:
    found = []
    for answer, *wordings in facts.TRIVIA:
        for wording in wordings:
            for wrapper in WRAPPERS:
                text = wrapper.format(q=wording)
                found.append(Question("trivia", text, text, answer))
    return found


def _translations() -> list[Question]:
    found = []
    for english, *foreign in facts.TRANSLATIONS:
        for language, word in zip(facts.LANGUAGES, foreign, strict=True):
            for form in _split(_TRANSLATION_FORMS):
                key = f"{language}|{english}|{form}"
                text = _capitalise(form.format(x=english, l=language))
                found.append(Question("translation", key, text, word))
    return found
