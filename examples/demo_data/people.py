"""Names, cities and short texts about people: what the extraction and the memory skills read.

Most names in training are made up from syllables, so that the model learns to copy any name
instead of knowing a list of them. The real ones below marked as held out are never trained on.
"""

from __future__ import annotations

import json
from random import Random

from demo_data import facts, geography

FIRST_NAMES = """
Anna Maria Laura Julia Sophie Emma Olivia Mia Lena Clara Nora Eva Alice Ella Grace Lucy Ruth Helen
Sarah Rachel Rebecca Hannah Emily Charlotte Victoria Isabel Carmen Lucia Elena Paula Teresa Rosa
Ingrid Astrid Freya Sigrid Yuki Sakura Aiko Mei Ling Priya Anjali Fatima Aisha Layla Zara Amina
Chloé Zoë Inès José João François André Łukasz Jürgen Søren Nadia Olga Irina Svetlana Tanya
John James Robert Michael David Thomas Daniel Paul Mark George Peter Henry Oliver Jack Harry Leo
Max Felix Oscar Hugo Victor Martin Simon Lukas Jonas Erik Lars Nils Bjorn Carlos Miguel Pedro Pablo
Diego Antonio Marco Luca Giovanni Pierre Louis Antoine Ivan Dmitri Boris Sergei Kenji Hiroshi Takeshi
Wei Jun Raj Arjun Sanjay Omar Ali Hassan Ahmed Yusuf Kofi Kwame Tunde Samuel Joseph Benjamin Noah
Adam Alex Chris Sam Ben Tom Tim Jim Bob Kate Amy Lily Rose Ivy Hazel Violet Claire Marie Diana
""".split()
HELD_OUT_FIRST_NAMES = """
Theodora Beatrice Margaret Dorothy Gwendolyn Penelope Matilda Ottilie Saoirse Niamh Birgitta Marta
Chiara Francesca Yolanda Ximena Thandiwe Chioma Nkechi Farida Parisa Leila Kavita Meera Hana Noriko
Katarzyna Zdenka Ludmila Renée Maëlle Walter Frederick Quentin Rupert Desmond Cornelius Giuseppe
Matteo Rafael Joaquín Esteban Thiago Mateus Anders Gunnar Mikkel Bogdan Radek Jiří Stanislav
Rustam Farhad Karim Idris Babajide Chinedu Sipho Vikram Rohan Haruto Minjun Tariq Wendell
""".split()

LAST_NAMES = """
Smith Jones Brown Taylor Wilson Miller Davis Clark Lewis Walker Hall Young King Wright Hill Green
Baker Adams Nelson Carter Mitchell Turner Parker Collins Edwards Stewart Morris Murphy Cook Rogers
Meyer Weber Schmidt Fischer Wagner Becker Müller Schäfer Dubois Laurent Moreau Rossi Russo Ferrari
Bianchi García López Silva Santos Costa Novak Kowalski Petrov Ivanov Hansen Larsen Nielsen Tanaka
Suzuki Sato Yamamoto Chen Wang Liu Kim Park Lee Singh Patel Sharma Khan Rahman Hussein Okafor Mensah
""".split()
HELD_OUT_LAST_NAMES = """
Abernathy Whitfield Thackeray Lindqvist Castellanos Fontaine Moretti Oyelaran Nakamura Venkatesan
Papadopoulos Zieliński Horvat Dragomir Vandenberg O'Sullivan MacGregor Al-Hashimi Kjeldsen Quispe
Bergström Delacroix Hawthorne Pemberton Achebe Ramanujan Takahashi Szabó Steiner Villanueva
""".split()

CITIES = (
    """
Paris|London|Berlin|Rome|Madrid|Lisbon|Vienna|Prague|Warsaw|Budapest|Athens|Dublin|Oslo|Stockholm
Helsinki|Copenhagen|Amsterdam|Brussels|Zurich|Geneva|Milan|Naples|Turin|Munich|Hamburg|Cologne
Barcelona|Seville|Porto|Lyon|Nice|Bordeaux|Manchester|Liverpool|Glasgow|Moscow|Istanbul|Ankara
Tokyo|Osaka|Kyoto|Seoul|Beijing|Shanghai|Bangkok|Hanoi|Manila|Jakarta|Mumbai|Delhi|Karachi|Dhaka
Cairo|Nairobi|Lagos|Accra|Tunis|Dakar|Sydney|Melbourne|Auckland|New York|Boston|Chicago|Dallas
Houston|Denver|Seattle|Miami|Atlanta|Los Angeles|San Francisco|San Diego|Las Vegas|Toronto
Montreal|Vancouver|Mexico City|Lima|Bogotá|Santiago|Buenos Aires|São Paulo|Rio de Janeiro|Havana
Cape Town|Tel Aviv|Abu Dhabi|Kuala Lumpur|Hong Kong|Málaga|Zürich|Düsseldorf|Kraków|Århus
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
HELD_OUT_CITIES = (
    """
Salzburg|Heidelberg|Leipzig|Rotterdam|Antwerp|Toulouse|Strasbourg|Bologna|Palermo|Valencia|Granada
Coimbra|Edinburgh|Sheffield|Galway|Bergen|Gothenburg|Tampere|Gdańsk|Brno|Debrecen|Plovdiv|Odessa
Nagoya|Sapporo|Busan|Chengdu|Hyderabad|Chennai|Lahore|Kandy|Surabaya|Cebu City|Marrakesh|Mombasa
Kumasi|Durban|Adelaide|Wellington|Philadelphia|Pittsburgh|Portland|New Orleans|Salt Lake City
St. Louis|Winnipeg|Guadalajara|Medellín|Córdoba|Valparaíso|Santa Cruz|Port Elizabeth|Besançon
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_ONSETS = """
b br c ch cl d dr f fl g gr h j k kl l m n p ph pr qu r s sh sl st t th tr v w y z kr vl zh mb
""".split() + [""] * 4  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ea", "ie", "ou", "é", "ö", "á", "y"]
_CODAS = ["", "", "", "", "n", "r", "l", "s", "t", "m", "k", "nd", "rt", "ck", "x", "ss", "lm", "d"]
_PLACE_ENDINGS = """
 ville ton burg field ford stadt grad abad ia mouth berg haven chester ham land
""".split() + [""] * 6  # fmt: skip

_LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3 + "aeiou" * 6 + "áäåãçéèêëíïñóöøõúüýžšćčłńőřßæ"

# Letters in a row of these make names: everything the model knows, and the names it may see.
_WORDS = sorted(
    {word.lower() for word in facts.word_list()}
    | {word.lower() for row in facts.TRANSLATIONS for text in row for word in text.split()}
    | {word.lower() for row in geography.COUNTRIES for text in row for word in text.split()}
    | {word.lower() for word in FIRST_NAMES + LAST_NAMES + CITIES}
)

# {n} is the name, {c} the city, {j} a job, {a} an age.
BOTH = """
My name is {n} and I live in {c}.
My name is {n}, I live in {c}.
My name is {n}. I live in {c}.
My name is {n} and I am from {c}.
I am {n} from {c}.
I'm {n} and I live in {c}.
I'm {n}, a {j} from {c}.
Hi, I'm {n} from {c}!
Hello, my name is {n} and I come from {c}.
{n} lives in {c}.
{n} is a {j} in {c}.
{n} works as a {j} in {c}.
{n} moved to {c} last year.
{n} is {a} years old and lives in {c}.
{n}, {a}, lives in {c}.
{n}, a {j} from {c}, likes tea.
{n} was born in {c}.
{n} comes from {c} and works as a {j}.
{n} has lived in {c} for {a} years.
{n} studies in {c}.
In {c} lives a {j} called {n}.
In {c}, {n} works as a {j}.
The {j} {n} lives in {c}.
The {j} from {c} is called {n}.
This is {n} from {c}.
This is {n}. She lives in {c} and works as a {j}.
This is {n}. He lives in {c} and is {a} years old.
Please meet {n}, who lives in {c}.
Yesterday {n} flew to {c}.
Last summer I met {n} in {c}.
My friend {n} lives in {c}.
Our new {j} is {n} from {c}.
We met {n}, a {j}, in {c}.
From {c} with love, {n}
Best wishes from {c}, {n}
Name: {n}, City: {c}
Name: {n}, age: {a}, city: {c}
City: {c}, Name: {n}
{n} ({c})
{n}, {c}
Order for {n}, to be sent to {c}.
Please send the parcel to {n} in {c}.
The customer {n} called from {c} today.
{n} wrote to us from {c} about a late order.
""".strip().splitlines()  # fmt: skip
NAME_ONLY = """
My name is {n}.
My name is {n} and I am {a} years old.
I'm {n} and I work as a {j}.
{n} is a {j}.
{n} likes tea and long walks.
This is {n}, our new {j}.
""".strip().splitlines()
CITY_ONLY = """
I live in {c}.
I am a {j} and I live in {c}.
We moved to {c} last year.
The weather in {c} is nice today.
She works in {c} as a {j}.
""".strip().splitlines()

_FILLERS = """
It is a sunny day.
The weather is nice today.
Thank you for your message.
The order is late.
I like music and long walks.
Tea is better than coffee.
Dogs are welcome here.
Have a nice day!
We have known each other for years.
Please call back tomorrow.
The meeting starts at nine.
""".strip().splitlines()

# text | name | city: sentences of other shapes than above, never trained on.
HAND_WRITTEN = facts.table("""
Hello everybody, I am Beatrice and I just arrived in Rotterdam. | Beatrice | Rotterdam
Dear Sir, my name is Walter Pemberton and I am writing from Sheffield. | Walter Pemberton | Sheffield
Karim runs a small bakery in Marrakesh. | Karim | Marrakesh
The train took Francesca Moretti to Bologna. | Francesca Moretti | Bologna
Born in Bergen, Gunnar now drives a bus. | Gunnar | Bergen
Haruto grew up in Sapporo. | Haruto | Sapporo
My sister Matilda studies law in Heidelberg. | Matilda | Heidelberg
Chiara Fontaine opened a shop in Toulouse last week. | Chiara Fontaine | Toulouse
You can find Rohan in Chennai. | Rohan | Chennai
Greetings from Salzburg! Yours, Penelope | Penelope | Salzburg
After ten years in Philadelphia, Desmond still likes it. | Desmond | Philadelphia
Farida, who is a nurse, lives in Lahore with her family. | Farida | Lahore
Customer: Thiago Villanueva, Guadalajara | Thiago Villanueva | Guadalajara
Everyone in Galway knows Niamh. | Niamh | Galway
I'm called Ludmila and my home is Brno. | Ludmila | Brno
Mikkel Kjeldsen (Gothenburg) | Mikkel Kjeldsen | Gothenburg
Adelaide is the home of Wendell. | Wendell | Adelaide
Could you send it to Dorothy in New Orleans? | Dorothy | New Orleans
Vikram got a new job in Hyderabad. | Vikram | Hyderabad
Joaquín and his dog live in Valparaíso. | Joaquín | Valparaíso
""")

EXTRACTIONS = """
Extract the name and city as JSON:
Extract the name and the city as JSON:
Extract name and city as JSON:
Extract the person's name and city as JSON:
Extract the name and city from this text as JSON:
Find the name and the city and answer in JSON:
Give me the name and the city as JSON:
Return a JSON object with name and city:
Return JSON with the keys name and city:
Who is it and which city? Answer as JSON:
Extract JSON with name and city from:
Turn this into JSON with name and city:
Get the name and city of the person in JSON format:
Name and city as JSON:
""".strip().splitlines()

JOBS = """
teacher doctor nurse farmer driver painter singer baker pilot lawyer dentist carpenter waiter
plumber librarian scientist journalist cook gardener student writer designer programmer tailor
""".split()


def made_up_name(rng: Random) -> str:
    """A name that nobody has: syllables, pieces of other words, or just letters.

    The pieces and letters make every token of the vocabulary appear inside names, in any order.
    """
    draw = rng.random()
    if draw < 0.4:
        syllables = [
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
            for _ in range(rng.choices((1, 2, 3, 4), (2, 8, 5, 1))[0])
        ]
        name = "".join(syllables)
    elif draw < 0.85:
        name = "".join(_piece(rng) for _ in range(rng.choices((1, 2, 3), (3, 5, 2))[0]))
    else:
        name = "".join(rng.choices(_LETTERS, k=rng.randint(2, 9)))
    return name[:16].capitalize()


def _piece(rng: Random) -> str:
    """A few letters in a row of some word."""
    word = rng.choice(_WORDS)
    size = rng.randint(2, 6)
    start = rng.randint(0, max(0, len(word) - size))
    return word[start : start + size]


def person(rng: Random, held_out: bool) -> str:
    """A first name, sometimes with a last name."""
    if held_out:
        first, last = rng.choice(HELD_OUT_FIRST_NAMES), rng.choice(HELD_OUT_LAST_NAMES)
    else:
        made_up = rng.random() < 0.7
        first = made_up_name(rng) if made_up else rng.choice(FIRST_NAMES)
        last = made_up_name(rng) if rng.random() < 0.6 else rng.choice(LAST_NAMES)
        # Shapes that the lists of real names have too.
        if rng.random() < 0.04:
            last = rng.choice(("O'", "Mc", "Mac", "Al-", "De ", "van ", "von ")) + last
        if rng.random() < 0.04:
            first += "-" + made_up_name(rng)
    return f"{first} {last}" if rng.random() < 0.35 else first


def city(rng: Random, held_out: bool) -> str:
    """A city, often made up in training."""
    if held_out:
        return rng.choice(HELD_OUT_CITIES)
    if rng.random() < 0.35:
        return rng.choice(CITIES)
    name = (made_up_name(rng) + rng.choice(_PLACE_ENDINGS)).replace("'", "")
    if rng.random() < 0.15:
        name += " " + rng.choice(("City", "Bay", "Falls", made_up_name(rng)))
    elif rng.random() < 0.15:
        name = (
            rng.choice(("New", "San", "St.", "Port", "Los", "Santa", "Fort", "Salt")) + f" {name}"
        )
    return name


def extraction(rng: Random, held_out: bool) -> tuple[str, str]:
    """(text, its JSON): a name and a city, or one of them with null for the other."""
    kind = rng.choices((BOTH, NAME_ONLY, CITY_ONLY), (10, 1, 1))[0]
    name, place = person(rng, held_out), city(rng, held_out)
    text = rng.choice(kind).format(n=name, c=place, j=rng.choice(JOBS), a=rng.randint(18, 80))
    draw = rng.random()
    if draw < 0.12:
        text = f"{rng.choice(_FILLERS)} {text}"
    elif draw < 0.24:
        text = f"{text} {rng.choice(_FILLERS)}"
    found = {
        "name": None if kind is CITY_ONLY else name,
        "city": None if kind is NAME_ONLY else place,
    }
    return text, json.dumps(found, ensure_ascii=False)
