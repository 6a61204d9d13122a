"""Short reviews with their sentiment, put together from word lists.

Held-out reviews combine subjects and verdicts that training never shows together; the list
HAND_WRITTEN was written without the grammar and is never trained on.
"""

from __future__ import annotations

from random import Random

from demo_data.facts import table

_SUBJECTS = """
film movie book novel song album show game restaurant pizza soup coffee tea meal dessert burger
hotel room bed pool beach phone laptop camera screen keyboard battery app website service staff
waiter delivery product jacket dress shirt pair of shoes sofa chair lamp toy trip tour museum
concert play course lesson teacher doctor car bike train flight seat price story plot acting music
ending sound picture quality food breakfast dinner lunch cake bread wine beer view location garden
headset watch bag tool vacuum printer software update design package order customer support
""".replace("pair of shoes", "shoe").replace("customer support", "support").split()  # fmt: skip

_GOOD = """
great good excellent amazing wonderful fantastic lovely perfect superb brilliant delightful
beautiful awesome outstanding enjoyable pleasant charming delicious impressive incredible fun
fabulous marvelous terrific splendid fresh friendly helpful comfortable reliable fast tasty
remarkable magnificent gorgeous exciting inspiring touching hilarious stunning flawless superior
""".split()
_BAD = """
terrible bad awful horrible boring poor disappointing dreadful disgusting broken useless ugly
annoying unpleasant dull mediocre slow rude dirty cold stale noisy uncomfortable unreliable
overpriced frustrating pathetic atrocious lousy bland tasteless cheap painful ridiculous faulty
tedious confusing depressing worthless flimsy defective inedible unbearable filthy appalling
""".split()
_PLAIN = """
okay average ordinary fine standard normal typical acceptable decent so-so alright fair usual
unremarkable passable middling
""".split()

# {s} stands for a subject, {w} for a word of the list of that sentiment.
_WORD_FORMS = """
The {s} was {w}.
The {s} is {w}.
The {s} was really {w}.
The {s} was very {w}.
The {s} was absolutely {w}!
This {s} is {w}.
This {s} is so {w}!
This {s} was {w}, and the {t} was {v}.
A {w} {s}.
What a {w} {s}!
Such a {w} {s}.
Really {w} {s}!
{W} {s}.
{W} {s} and {v} {t}.
{W}, just {w}.
{W}!
Simply {w}.
The {s} was {w} and the {t} was {v}.
I found the {s} {w}.
I thought the {s} was {w}.
We had a {w} time, and the {s} was {v}.
My {s} is {w}.
Our {s} was {w} and {v}.
The {s}: {w}. The {t}: {v}.
It was {w} and {v}.
It's {w}.
It is a {w} {s}.
It was {w}.
{W} {s}, {v} {t}, that sums it up.
The new {s} is {w}.
Everything was {w}.
Everything about the {s} is {w}.
{W} {s} with a {v} {t}.
A {w} {s} and a {v} {t} as well.
I have never had such a {w} {s}.
The {s} looks {w} and feels {v}.
My new {s} is {w}, I use it every day.
{W} {s} for the price.
One of the most {w} things about it is the {s}.
""".strip().splitlines()  # fmt: skip

# sentiment | sentence
_PHRASES = table("""
positive | I love this {s}; positive | I loved the {s}; positive | I really like the {s}
positive | I enjoyed the {s} a lot; positive | I enjoyed every minute of it
positive | Best {s} ever; positive | The best {s} I have ever had; positive | Highly recommended
positive | I would recommend this {s} to everyone; positive | I will buy it again
positive | I will come back; positive | We will definitely come back; positive | Worth every penny
positive | The {s} exceeded my expectations; positive | The {s} made my day; positive | Five stars
positive | I am very happy with the {s}; positive | I'm so pleased with this {s}
positive | I am impressed by the {s}; positive | It works perfectly; positive | It works like a charm
positive | The {s} made me smile; positive | I can't stop smiling; positive | We had a lot of fun
positive | I can't get enough of it; positive | Not bad at all; positive | I fell in love with the {s}
positive | Nothing to complain about; positive | I have no complaints; positive | A real pleasure
positive | My kids love it; positive | My whole family loved the {s}; positive | A must-have
positive | Could not be better; positive | It couldn't be better; positive | Well done
positive | I was not disappointed; positive | It did not disappoint; positive | Thumbs up
positive | The {s} never lets me down; positive | Great value for money; positive | I'm a big fan
positive | Everything was perfect; positive | It is better than I expected; positive | So happy
positive | It made me very happy; positive | I am glad I bought it; positive | Exactly what I wanted
positive | The {s} was a wonderful surprise; positive | I would gladly do it again; positive | Thank you
positive | It arrived early and works well; positive | Beautifully made; positive | I adore this {s}
negative | I hate this {s}; negative | I hated the {s}; negative | I really dislike the {s}
negative | I did not like the {s}; negative | I didn't like the {s}; negative | I don't like it
negative | I did not enjoy the {s}; negative | I didn't enjoy it at all; negative | Worst {s} ever
negative | The worst {s} I have ever had; negative | I would not recommend this {s}
negative | I do not recommend it; negative | I don't recommend this {s}; negative | Never again
negative | I will never buy it again; negative | I will never come back; negative | We won't be back
negative | A waste of money; negative | A complete waste of time; negative | What a waste of money
negative | Don't buy this {s}; negative | Do not buy it; negative | Avoid this {s}; negative | Stay away
negative | I want my money back; negative | I want a refund; negative | One star
negative | I returned the {s}; negative | I had to send it back; negative | I regret buying this {s}
negative | The {s} broke after one day; negative | The {s} stopped working after a week
negative | It does not work; negative | It doesn't work; negative | It never worked; negative | It fell apart
negative | The {s} was not good; negative | Not good; negative | Not worth the money; negative | Not worth it
negative | The {s} was not worth it; negative | I am very disappointed; negative | I was disappointed
negative | I'm so disappointed with this {s}; negative | I am not happy with the {s}; negative | Very sad
negative | I'm not satisfied; negative | I fell asleep; negative | I almost fell asleep; negative | Thumbs down
negative | We left early; negative | I couldn't wait for it to end; negative | The {s} made me angry
negative | The {s} made me sick; negative | It could not be worse; negative | It couldn't be worse
negative | It let me down; negative | The {s} let me down; negative | Nobody helped us; negative | A disaster
negative | We waited two hours; negative | It arrived late and damaged; negative | It arrived broken
negative | The {s} smelled bad; negative | It is worse than I expected; negative | Such a letdown
negative | Nothing worked; negative | Far too expensive for what it is; negative | Too much noise
neutral | The {s} is okay, nothing special; neutral | It is okay; neutral | It's okay, I guess
neutral | Nothing special; neutral | Neither good nor bad; neutral | The {s} was neither good nor bad
neutral | It does the job; neutral | It does what it should; neutral | The {s} was as expected
neutral | As expected; neutral | Not great, not terrible; neutral | Not good, not bad; neutral | So-so
neutral | I have no strong opinion about the {s}; neutral | I have mixed feelings about it
neutral | Some parts were good, some were bad; neutral | The {s} was good but the {t} was bad
neutral | I liked the {s} but not the {t}; neutral | Good {s}, bad {t}; neutral | It is what it is
neutral | The {s} arrived on Tuesday; neutral | The {s} is blue; neutral | The {s} has two buttons
neutral | The {s} comes in a box; neutral | I bought the {s} last week; neutral | It weighs two kilos
neutral | I have used the {s} for a month; neutral | We ordered the {s} online; neutral | Three stars
neutral | The {s} is next to the station; neutral | They open at nine; neutral | It costs ten euros
neutral | There is a {s} and a {t}; neutral | It could be better, it could be worse
neutral | The {s} is average; neutral | An average {s}; neutral | I don't mind it; neutral | It was fine
""")

_FILLERS = (
    """
I went there with my family. | We ordered it last week. | I bought it for my sister. |
We were there in May. | It was my first time. | I got it as a gift. | I saw it yesterday. |
We stayed for two nights. | I have had it for a month. | My friend told me about it. |
""".replace("\n", " ")
    .strip(" |")
    .split(" | ")
)

INSTRUCTIONS = """
Classify the sentiment: {text}
Classify the sentiment of this review: {text}
Classify the sentiment of the text: {text}
Classify the sentiment as positive, negative or neutral: {text}
Classify this review as positive, negative or neutral: {text}
Classify as positive, negative or neutral: {text}
What is the sentiment of this review? {text}
What is the sentiment? {text}
What is the sentiment of this text? {text}
Is the sentiment positive, negative or neutral? {text}
Is this review positive, negative or neutral? {text}
Tell me the sentiment of this review: {text}
Sentiment of this review: {text}
Sentiment analysis: {text}
Label the sentiment: {text}
Rate this review as positive, negative or neutral: {text}
Review: {text}
Sentiment:
Review: {text} Sentiment:
Text: {text}
Sentiment:
{text}
Sentiment:
{text}
Is this positive, negative or neutral?
{text} What is the sentiment?
""".strip()
# Instructions of several lines end in "Sentiment:" or start with {text} alone on a line.
TWO_WAY = """
Is this review positive or negative? {text}
Is this positive or negative? {text}
Positive or negative? {text}
Is the sentiment positive or negative? {text}
Classify this review as positive or negative: {text}
Classify the sentiment as positive or negative: {text}
Does the writer like it? Answer positive or negative: {text}
""".strip().splitlines()

# sentiment | review: written by hand, in other words than the grammar's where they came naturally.
HAND_WRITTEN = table("""
positive | Great phone, the battery lasts all day and the camera is excellent.
positive | We loved our stay, the staff were friendly and the breakfast was delicious.
positive | This is the best coffee I have had in years!
positive | A wonderful film with brilliant acting. I enjoyed every scene.
positive | My daughter loves this toy, she plays with it every day.
positive | Fast delivery and good quality, I am very happy.
positive | The soup was tasty and the waiter was very helpful.
positive | I can highly recommend this hotel to all families.
positive | Beautiful garden, lovely room, and a comfortable bed.
positive | The new update is awesome, everything is fast now.
positive | Exactly what I was looking for. Works perfectly!
positive | What a fantastic concert! The music was amazing.
positive | I am so glad I bought this chair, my back feels great.
positive | Very good book, I read it in one day.
positive | The teacher is friendly and the lessons are fun.
positive | An outstanding meal at a fair price, we will come back.
positive | Superb sound and a gorgeous design.
positive | The story was touching and the ending was perfect.
negative | The battery died after two days and nobody answered my email.
negative | We hated the hotel, the room was dirty and the bed was uncomfortable.
negative | This is the worst coffee I have ever had.
negative | A boring film with terrible acting. I almost fell asleep.
negative | The toy broke on the first day, what a waste of money.
negative | Slow delivery and poor quality, I am very disappointed.
negative | The soup was cold and the waiter was rude.
negative | I can not recommend this hotel to anyone.
negative | Ugly garden, noisy room, and a horrible breakfast.
negative | The new update is awful, everything is slow now.
negative | Not what I was looking for. It does not work at all.
negative | What a terrible concert! The sound was bad.
negative | I regret buying this chair, it is so uncomfortable.
negative | A very dull book, I did not finish it.
negative | The teacher is rude and the lessons are boring.
negative | An overpriced meal, we will never come back.
negative | The screen stopped working after a week, I want my money back.
negative | The plot was confusing and the ending was disappointing.
neutral | The phone is okay, nothing special.
neutral | It does the job, no more and no less.
neutral | The book was neither good nor bad.
neutral | An average hotel, about what I expected.
neutral | I ordered the lamp on Monday and it arrived on Thursday.
neutral | The food was good but the service was slow.
neutral | Some songs are great, some are bad.
neutral | The shirt is blue and has two pockets.
neutral | It was fine, I have no strong opinion.
neutral | The museum is open from nine to five.
""")

_WORDS = {"positive": _GOOD, "negative": _BAD, "neutral": _PLAIN}


def review(rng: Random) -> tuple[str, str]:
    """(text, sentiment) of one to three sentences."""
    sentiment = rng.choices(("positive", "negative", "neutral"), (4, 4, 3))[0]
    sentences = [_sentence(rng, sentiment) for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0])]
    if rng.random() < 0.15:
        sentences.insert(rng.randint(0, 1), rng.choice(_FILLERS))
    text = " ".join(sentences)
    if rng.random() < 0.1:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip(".!")
    return text, sentiment


def _sentence(rng: Random, sentiment: str) -> str:
    words = _WORDS[sentiment]
    first, second = rng.choice(words), rng.choice(words)
    names = {"s": rng.choice(_SUBJECTS), "t": rng.choice(_SUBJECTS)}
    draw = rng.random()
    if draw < 0.5:
        form = rng.choice(_WORD_FORMS)
        sentence = form.format(w=first, v=second, W=first.capitalize(), **names)
    elif draw < 0.6:
        if sentiment == "neutral":
            sentence = _mixed(rng, **names)
        else:
            sentence = _negated(rng, sentiment, names["s"])
    else:
        phrases = [phrase for name, phrase in _PHRASES if name == sentiment]
        sentence = rng.choice(phrases).format(**names)
        if rng.random() < 0.25:
            sentence += f", {_tail(rng, sentiment, names['t'])}"
        sentence += rng.choice(".....!")
    return _articles(sentence)


def _negated(rng: Random, sentiment: str, subject: str) -> str:
    """ "not good" is negative, "not bad" positive."""
    words = _GOOD if sentiment == "negative" else _BAD
    word = rng.choice(words)
    forms = (
        f"The {subject} was not {word}.",
        f"The {subject} was not {word} at all.",
        f"The {subject} wasn't {word}.",
        f"This {subject} is not {word}.",
        f"It is not {word}.",
        f"Not {word} at all.",
        f"Not a {word} {subject}.",
    )
    return rng.choice(forms)


def _mixed(rng: Random, s: str, t: str) -> str:
    good, bad = rng.choice(_GOOD), rng.choice(_BAD)
    forms = (
        f"The {s} was {good} but the {t} was {bad}.",
        f"The {s} was {bad} but the {t} was {good}.",
        f"The {s} is {good}, but the {t} is {bad}.",
        f"{good.capitalize()} {s}, but {bad} {t}.",
        f"The {t} was {bad}, but I liked the {s}.",
    )
    return rng.choice(forms)


def _tail(rng: Random, sentiment: str, subject: str) -> str:
    word = rng.choice(_WORDS[sentiment])
    forms = (
        f"and the {subject} was {word}",
        f"the {subject} is {word}",
        f"it was {word}",
        f"it is so {word}",
    )
    return rng.choice(forms)


def _articles(sentence: str) -> str:
    """ "a awful" -> "an awful"."""
    words = sentence.split(" ")
    for index in range(len(words) - 1):
        if words[index] in ("a", "A") and words[index + 1][:1].lower() in "aeiou":
            if words[index + 1] not in ("one", "usual", "useless"):
                words[index] += "n"
    return " ".join(words)


def instructions() -> list[str]:
    """Every wording of the task; {text} stands for the review."""
    found: list[str] = []
    lines = INSTRUCTIONS.splitlines()
    while lines:
        wording = lines.pop(0)
        if lines and (lines[0] == "Sentiment:" or wording == "{text}"):
            wording += "\n" + lines.pop(0)
        found.append(wording)
    return found
