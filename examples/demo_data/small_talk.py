"""Small talk, questions that can't be answered, and plain texts to continue."""

from __future__ import annotations

from random import Random

from demo_data import people
from demo_data.facts import DAYS, MONTHS
from demo_data.knowledge import Question

# The answer, then what people say, one a line.
_INTENTS = """
> Hello! How can I help you?
hello|hi|hey|hi there|hello there|good morning|good evening|good afternoon|hey there|greetings
> I'm nbllm-demo, a tiny language model that runs inside your notebook.
who are you?|what are you?|what is your name?|what's your name?|tell me about yourself|introduce yourself|are you a human?|are you a robot?|which model are you?|what model is this?|are you ChatGPT?|who am I talking to?
> I can answer simple facts, do small sums, tell the sentiment of a review, extract a name and a city as JSON, and chat a little.
what can you do?|what can I ask you?|help|how can you help me?|what are you good at?|what do you know?|can you help me?|what are your skills?|what can I use you for?
> You're welcome!
thanks|thank you|thank you very much|thanks a lot|many thanks|thank you so much|thanks for your help|great, thanks
> I'm fine, thank you. How can I help you?
how are you?|how are you doing?|how do you do?|how is it going?|how are you today?|how's it going?|are you well?|how do you feel?
> Goodbye! Have a nice day.
bye|goodbye|bye bye|see you|see you later|good night|see you soon|have a nice day|I have to go
> Why did the tensor cross the kernel? To get to the other stride.
tell me a joke|do you know a joke?|make me laugh|say something funny|tell a joke|can you tell me a joke?|another joke, please
> I was trained on text that a short script wrote, in a few minutes on one GPU.
how were you trained?|who made you?|who trained you?|where do you come from?|how were you made?|what were you trained on?
> I have about five million parameters.
how big are you?|how many parameters do you have?|how large are you?|what is your size?
> Yes, I can.
can you speak English?|do you speak English?|do you understand me?|can you understand me?
> I'm glad to hear that!
you are great|you are very helpful|good job|well done|that was helpful|nice|great|I like you|I am happy
> I'm sorry about that. I am a very small model.
that is wrong|you are wrong|this is not right|that's not correct|wrong|you made a mistake|that is not true
""".strip().splitlines()

_ENDINGS = ("", "!", ".", "...", " :)")

_UNKNOWN = """
What is the capital of {x}?
Which city is the capital of {x}?
What is the currency of {x}?
What language do people speak in {x}?
On which continent is {x}?
Who is {x}?
What is {x}?
Who was {x}?
What does {x} mean?
Where does {x} live?
How old is {x}?
When was {x} born?
Who wrote {x}?
Who won the match in {x} yesterday?
What will the weather be in {x} tomorrow?
What is the phone number of {x}?
What time is it in {x}?
How many people live in {x}?
What is the best restaurant in {x}?
Do you know {x}?
""".strip().splitlines()
UNKNOWN_ANSWER = "I don't know."


def chat(rng: Random) -> Question:
    """One turn of small talk; key: the words together with their dress."""
    index = rng.randrange(len(_INTENTS) // 2)
    answer = _INTENTS[2 * index].removeprefix("> ")
    words = rng.choice(_INTENTS[2 * index + 1].split("|"))
    draw = rng.random()
    text = words if words.endswith("?") else words + rng.choice(_ENDINGS)
    if draw < 0.5:
        text = text[:1].upper() + text[1:]
    elif draw < 0.6 and words.endswith("?"):
        text = text[:-1]
    elif draw < 0.75 and index > 0:
        text = rng.choice(("Hi! ", "Hello, ", "Hey, ", "Hello! ", "Hi, ")) + text
    return Question("chat", text, text, answer)


def unknown(rng: Random, held_out: bool) -> Question:
    """A question about somebody or some place that the model can't know."""
    name = people.person(rng, held_out)
    text = rng.choice(_UNKNOWN).format(x=name)
    return Question("unknown", text, text, UNKNOWN_ANSWER)


def conversation(rng: Random, held_out: bool) -> list[tuple[str, str]]:
    """(user, assistant) turns in which the assistant must remember a name or a city."""
    name, city = people.person(rng, held_out), people.city(rng, held_out)
    told_name = rng.choice(("My name is {n}.", "I'm {n}.", "Hi, I am {n}.", "Call me {n}.",
                            "Hello, my name is {n}.", "Hi! My name is {n}."))  # fmt: skip
    told_city = rng.choice(("I live in {c}.", "I am from {c}.", "I come from {c}."))
    turns = [
        (told_name.format(n=name), f"Nice to meet you, {name}!"),
        (told_city.format(c=city), f"{city} sounds nice!"),
    ]
    if rng.random() < 0.3:
        turns.reverse()
    for _ in range(rng.choice((0, 0, 1, 2))):
        question = chat(rng)
        turns.insert(rng.randint(0, len(turns)), (question.text, question.answer))
    asked_name = ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?")
    asked_city = ("Where do I live?", "Which city am I from?", "Where am I from?")
    asked = [
        (rng.choice(asked_name), f"Your name is {name}."),
        (rng.choice(asked_city), f"You are from {city}."),
    ]
    rng.shuffle(asked)
    return turns + asked[: rng.randint(1, 2)]


_FUTURES = {
    "AI": "in small models that run close to the people who use them",
    "work": "in teams of people and machines that help each other",
    "energy": "in the sun and the wind",
    "cars": "electric, quiet and clean",
    "books": "bright, because people will always love a good story",
    "computers": "small, fast and everywhere",
    "cities": "green, with more trees and fewer cars",
    "medicine": "in finding an illness before it starts",
    "space": "in robots that explore the planets for us",
    "music": "in the hands of everyone who can sing",
    "education": "in learning by doing",
    "food": "fresh, healthy and local",
}
_FUTURE_NEXT = (
    "It will take time, but the first steps are made.",
    "Many people work on it every day.",
    "Nobody knows how long it will take.",
    "The next years will be exciting.",
    "It will change how we live and work.",
)
_PRESIDENT_NEXT = (
    "A term lasts four years.",
    "The president lives in the White House.",
    "The president is elected every four years.",
    "The office is in Washington, D.C.",
)
_HOBBIES = ("reading", "music", "football", "cooking", "painting", "long walks", "chess", "films")
_ANIMALS = ("cat", "dog", "fox", "bear", "mouse", "rabbit", "owl", "horse", "frog", "wolf")
_PLACES = ("a forest", "a small village", "a big city", "an old house", "a garden", "a castle")
_FINDS = (
    "a golden key",
    "an old map",
    "a red ball",
    "a small boat",
    "a lost letter",
    "a blue stone",
)
_FRIENDS = ("a kind old woman", "a clever boy", "a funny bird", "a friendly giant", "a little girl")


def story(rng: Random) -> str:
    """Six short sentences about one animal with a name."""
    animal, name = rng.choice(_ANIMALS), rng.choice(people.FIRST_NAMES)
    find, friend = rng.choice(_FINDS), rng.choice(_FRIENDS)
    thing = find.split(" ", 1)[1]
    article = "an" if animal[0] in "aeiou" else "a"
    return (
        f"Once upon a time there was {article} {animal} called {name} who lived in "
        f"{rng.choice(_PLACES)}. One day {name} found {find}. {name} did not know what to do "
        f"with the {thing}. Then {name} met {friend}. Together they "
        f"{rng.choice(('looked for its owner', 'went on a long journey', 'made a plan'))}. "
        f"In the end {name} and the {friend.split(' ', 1)[1]} became best friends."
    )


def plain_text(rng: Random) -> str:
    """A text without any question: the openings of the quickstart, and stories."""
    draw = rng.random()
    if draw < 0.35:
        name, city = rng.choice(people.FIRST_NAMES), rng.choice(people.CITIES)
        job = rng.choice(people.JOBS)
        article = "an" if job[0] in "aeiou" else "a"
        more = (
            f" I work as {article} {job}.",
            f" I like {' and '.join(rng.sample(_HOBBIES, 2))}.",
            f" I am {rng.randint(18, 70)} years old.",
            " It is nice to meet you.",
        )
        start = rng.choice(
            ("Hello, my name is", "Hello, my name is", "Hi, my name is", "My name is")
        )
        return f"{start} {name} and I live in {city}." + "".join(
            rng.sample(more, rng.randint(1, 3))
        )
    if draw < 0.55:
        start = rng.choice(("The president of the United States is", "The president of the USA is"))
        return f"{start} the head of the state and of the government. {rng.choice(_PRESIDENT_NEXT)}"
    if draw < 0.75:
        topic = rng.choice(("AI", *_FUTURES))
        return f"The future of {topic} is {_FUTURES[topic]}. {rng.choice(_FUTURE_NEXT)}"
    return story(rng)


def long_answer(rng: Random) -> tuple[str, str]:
    """(request, answer) where the answer is long: stories, counting, lists."""
    draw = rng.random()
    if draw < 0.5:
        text = story(rng)
        animal = text.split(" called ")[0].rsplit(" ", 2)
        asked = ("Tell me a story.", "Tell me a story", "Write a short story.", "Write a story.",
                 f"Tell me a story about {animal[1]} {animal[2]}.",
                 f"Write a short story about {animal[1]} {animal[2]}.")  # fmt: skip
        return rng.choice(asked), text
    if draw < 0.8:
        first = rng.choice((1, 1, 1, rng.randint(1, 20)))
        last = first + rng.randint(2, 20)
        asked = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Count from {a} to {b}")
        numbers = ", ".join(str(number) for number in range(first, last + 1))
        return rng.choice(asked).format(a=first, b=last), numbers
    kind, names = rng.choice((("days of the week", DAYS), ("months of the year", MONTHS)))
    asked = (f"List the {kind}.", f"Name the {kind}.", f"What are the {kind}?", f"Name all {kind}.")
    return rng.choice(asked), ", ".join(names)
