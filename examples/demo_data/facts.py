"""The facts that the demo model knows: plain tables, parsed once.

Each table is a block of text with one fact a line and `|` between its parts, which keeps it
readable and easy to extend. Nothing here is random.
"""

from __future__ import annotations


def table(text: str) -> list[tuple[str, ...]]:
    """Parse `a | b | c` lines; several facts may share a line when parted by `;`."""
    facts = text.replace(";", "\n").splitlines()
    return [tuple(part.strip() for part in fact.split("|")) for fact in facts if fact.strip()]


# element | symbol | atomic number
ELEMENTS = table("""
hydrogen | H | 1; helium | He | 2; lithium | Li | 3; beryllium | Be | 4; boron | B | 5
carbon | C | 6; nitrogen | N | 7; oxygen | O | 8; fluorine | F | 9; neon | Ne | 10
sodium | Na | 11; magnesium | Mg | 12; aluminium | Al | 13; silicon | Si | 14; phosphorus | P | 15
sulfur | S | 16; chlorine | Cl | 17; argon | Ar | 18; potassium | K | 19; calcium | Ca | 20
titanium | Ti | 22; chromium | Cr | 24; manganese | Mn | 25; iron | Fe | 26; cobalt | Co | 27
nickel | Ni | 28; copper | Cu | 29; zinc | Zn | 30; arsenic | As | 33; bromine | Br | 35
silver | Ag | 47; tin | Sn | 50; iodine | I | 53; tungsten | W | 74; platinum | Pt | 78
gold | Au | 79; mercury | Hg | 80; lead | Pb | 82; radium | Ra | 88; uranium | U | 92
""")

# thing | colour; the thing stands after "of" and before "is"
COLOURS = table("""
the sky | blue; grass | green; snow | white; coal | black; blood | red; milk | white; the sea | blue
a banana | yellow; a lemon | yellow; a tomato | red; a strawberry | red; an orange | orange
a carrot | orange; a pumpkin | orange; chocolate | brown; coffee | brown; a cherry | red
a cucumber | green; a frog | green; a swan | white; a crow | black; a raven | black
an elephant | grey; a mouse | grey; a flamingo | pink; a pig | pink; the sun | yellow; gold | yellow
silver | grey; a polar bear | white; the night | black; a lime | green; spinach | green
an aubergine | purple; a plum | purple; lavender | purple; a fire engine | red; a ruby | red
an emerald | green; a sapphire | blue; salt | white; sugar | white; cream | white; rice | white
a ladybird | red; a canary | yellow; a sunflower | yellow; a chick | yellow; butter | yellow
wood | brown; mud | brown; a bear | brown; a leaf | green; broccoli | green; a raspberry | red
a blueberry | blue; ketchup | red; mustard | yellow; a cloud | white; ash | grey; peas | green
""")

OPPOSITES = table("""
hot | cold; big | small; tall | short; fast | slow; good | bad; happy | sad; old | young
light | dark; day | night; up | down; left | right; in | out; open | closed; full | empty
hard | soft; high | low; rich | poor; strong | weak; early | late; wet | dry; clean | dirty
loud | quiet; thick | thin; wide | narrow; deep | shallow; heavy | light; black | white; yes | no
true | false; right | wrong; first | last; near | far; begin | end; start | stop; push | pull
buy | sell; win | lose; love | hate; friend | enemy; summer | winter; north | south; east | west
before | after; above | below; inside | outside; always | never; all | none; more | less
brave | cowardly; cheap | expensive; easy | difficult; sweet | sour; sharp | blunt; smooth | rough
safe | dangerous; same | different; alive | dead; asleep | awake; polite | rude; kind | cruel
lucky | unlucky; visible | invisible; possible | impossible; useful | useless; front | back
top | bottom; give | take; laugh | cry; arrive | leave; remember | forget; rise | fall
man | woman; boy | girl; king | queen; brother | sister; mother | father
accept | refuse; increase | decrease; maximum | minimum; success | failure; war | peace
""")

# The word asked for and the answer, where the reverse of a pair would have two answers.
_ONE_WAY = {"light": "dark", "right": "left", "day": "night"}

IRREGULAR_PLURALS = table("""
mouse | mice; foot | feet; tooth | teeth; goose | geese; man | men; woman | women
child | children; person | people; ox | oxen; sheep | sheep; fish | fish; deer | deer
leaf | leaves; knife | knives; wife | wives; life | lives; wolf | wolves; half | halves
shelf | shelves; thief | thieves; loaf | loaves; baby | babies; city | cities; lady | ladies
story | stories; party | parties; country | countries; family | families; berry | berries
cherry | cherries; fly | flies; puppy | puppies; box | boxes; fox | foxes; bus | buses
glass | glasses; class | classes; dress | dresses; dish | dishes; brush | brushes
watch | watches; church | churches; match | matches; beach | beaches; bench | benches
potato | potatoes; tomato | tomatoes; hero | heroes; peach | peaches; sandwich | sandwiches
""")

REGULAR_NOUNS = """
    cat dog house car tree book table chair phone pen apple banana bird horse cow duck chicken
    lion tiger bear monkey elephant door window garden river mountain lake road street town
    village school teacher doctor nurse farmer driver painter singer king queen boy girl
    friend brother sister hand finger arm leg eye ear nose shirt hat shoe sock coat jacket
    ring clock lamp bed room kitchen cup plate spoon fork bottle bag letter stamp train plane
    boat ship bicycle truck song game ball toy flower star cloud day night week month year key
    wall roof bridge island computer camera machine engine lemon orange carrot onion egg cake
    cookie pencil paper
""".split()

# animal | sound (a verb) | legs | young
ANIMALS = table("""
dog | barks | 4 | puppy; cat | meows | 4 | kitten; cow | moos | 4 | calf; duck | quacks | 2 | duckling
sheep | bleats | 4 | lamb; horse | neighs | 4 | foal; pig | oinks | 4 | piglet; lion | roars | 4 | cub
goat | bleats | 4 | kid; bee | buzzes | 6 | larva; frog | croaks | 4 | tadpole; owl | hoots | 2 | owlet
snake | hisses | 0 | ; wolf | howls | 4 | pup; mouse | squeaks | 4 | pup; crow | caws | 2 | ;
donkey | brays | 4 | foal; hen | clucks | 2 | chick; bear | growls | 4 | cub; tiger | roars | 4 | cub
dove | coos | 2 | ; cricket | chirps | 6 | ; turkey | gobbles | 2 | ; elephant | trumpets | 4 | calf
goose | honks | 2 | gosling; rooster | crows | 2 | ; spider | | 8 | ; ant | | 6 | ; beetle | | 6 |
butterfly | | 6 | caterpillar; crab | | 10 | ; octopus | | 8 | ; fish | | 0 | ; worm | | 0 |
rabbit | | 4 | kit; kangaroo | | 2 | joey; deer | | 4 | fawn; swan | | 2 | cygnet; fox | | 4 | cub
eagle | | 2 | eaglet; chicken | | 2 | chick; penguin | | 2 | chick; camel | | 4 | calf
giraffe | | 4 | calf; monkey | chatters | 2 | ; zebra | | 4 | foal; whale | | 0 | calf; fly | buzzes | 6 |
""")

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = """
    January February March April May June July August September October November December
""".split()
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]

# answer | question | another wording | another wording ...
TRIVIA = table("""
7 | How many days are in a week? | How many days does a week have? | How many days are there in a week?
12 | How many months are in a year? | How many months does a year have? | How many months are there in a year?
24 | How many hours are in a day? | How many hours does a day have? | How many hours are there in a day?
60 | How many minutes are in an hour? | How many minutes does an hour have? | How many minutes are there in an hour?
60 | How many seconds are in a minute? | How many seconds does a minute have? | How many seconds are there in a minute?
365 | How many days are in a year? | How many days does a year have? | How many days are there in a year?
100 | How many years are in a century? | How many years does a century have? | How many years are there in a century?
10 | How many years are in a decade? | How many years does a decade have? | How many years are there in a decade?
26 | How many letters are in the English alphabet? | How many letters does the alphabet have? | How many letters are there in the alphabet?
7 | How many continents are there? | How many continents does the Earth have? | What is the number of continents?
8 | How many planets are in the solar system? | How many planets does the solar system have? | How many planets are there?
3 | How many sides does a triangle have? | How many sides are in a triangle? | What is the number of sides of a triangle?
4 | How many sides does a square have? | How many sides are in a square? | What is the number of sides of a square?
5 | How many sides does a pentagon have? | How many sides are in a pentagon? | What is the number of sides of a pentagon?
6 | How many sides does a hexagon have? | How many sides are in a hexagon? | What is the number of sides of a hexagon?
2 | How many wheels does a bicycle have? | How many wheels are on a bicycle? | How many wheels does a bike have?
4 | How many wheels does a car have? | How many wheels are on a car? | What is the number of wheels of a car?
12 | How many things are in a dozen? | How many eggs are in a dozen? | How many is a dozen?
5 | How many fingers are on one hand? | How many fingers does a hand have? | How many fingers are there on a hand?
Jupiter | What is the largest planet? | Which planet is the biggest? | What is the largest planet in the solar system?
Mercury | Which planet is closest to the sun? | What is the smallest planet? | What planet is nearest to the sun?
Mars | Which planet is called the red planet? | What is the red planet? | Which planet is red?
the Moon | What goes around the Earth? | What is the Earth's satellite? | What shines at night?
the Sun | What star is closest to the Earth? | Which star is nearest to us? | What does the Earth go around?
the Pacific Ocean | What is the largest ocean? | Which ocean is the biggest? | What is the biggest ocean in the world?
Mount Everest | What is the highest mountain? | Which mountain is the tallest? | What is the tallest mountain in the world?
the Nile | What is the longest river? | Which river is the longest? | What is the longest river in the world?
the blue whale | What is the largest animal? | Which animal is the biggest? | What is the biggest animal in the world?
the cheetah | What is the fastest land animal? | Which land animal is the fastest? | Which animal runs the fastest?
the giraffe | What is the tallest animal? | Which animal is the tallest? | What animal has the longest neck?
Asia | What is the largest continent? | Which continent is the biggest? | What is the biggest continent?
Russia | What is the largest country? | Which country is the biggest? | What is the biggest country in the world?
ice | What is frozen water called? | What does water become when it freezes? | What is water when it is frozen?
steam | What does water become when it boils? | What is water vapour called? | What comes out of boiling water?
H2O | What is the chemical formula of water? | What is the formula for water? | What is water made of?
0 degrees Celsius | At what temperature does water freeze? | When does water freeze? | What is the freezing point of water?
100 degrees Celsius | At what temperature does water boil? | When does water boil? | What is the boiling point of water?
bees | What animals make honey? | Which insects make honey? | Who makes honey?
cows | Which animals give us milk? | Where does milk come from? | What animals does milk come from?
the heart | What organ pumps blood? | Which organ pumps the blood? | What pumps blood in the body?
William Shakespeare | Who wrote Romeo and Juliet? | Who wrote Hamlet? | Who is the author of Hamlet?
Leonardo da Vinci | Who painted the Mona Lisa? | Who is the painter of the Mona Lisa? | Which artist painted the Mona Lisa?
Neil Armstrong | Who was the first person on the Moon? | Who first walked on the Moon? | Who was the first man on the Moon?
Albert Einstein | Who developed the theory of relativity? | Who found E = mc2? | Whose theory is relativity?
oxygen | What gas do we breathe? | What gas do people need to breathe? | Which gas do animals breathe?
""")

# English | French | German | Spanish
TRANSLATIONS = table("""
dog | chien | Hund | perro; cat | chat | Katze | gato; horse | cheval | Pferd | caballo
bird | oiseau | Vogel | pájaro; fish | poisson | Fisch | pez; cow | vache | Kuh | vaca
pig | cochon | Schwein | cerdo; mouse | souris | Maus | ratón; lion | lion | Löwe | león
bear | ours | Bär | oso; wolf | loup | Wolf | lobo; duck | canard | Ente | pato
house | maison | Haus | casa; tree | arbre | Baum | árbol; flower | fleur | Blume | flor
water | eau | Wasser | agua; bread | pain | Brot | pan; milk | lait | Milch | leche
cheese | fromage | Käse | queso; apple | pomme | Apfel | manzana; egg | oeuf | Ei | huevo
butter | beurre | Butter | mantequilla; meat | viande | Fleisch | carne; salt | sel | Salz | sal
sugar | sucre | Zucker | azúcar; wine | vin | Wein | vino; beer | bière | Bier | cerveza
coffee | café | Kaffee | café; tea | thé | Tee | té; sun | soleil | Sonne | sol
moon | lune | Mond | luna; star | étoile | Stern | estrella; sky | ciel | Himmel | cielo
sea | mer | Meer | mar; river | rivière | Fluss | río; mountain | montagne | Berg | montaña
forest | forêt | Wald | bosque; fire | feu | Feuer | fuego; snow | neige | Schnee | nieve
rain | pluie | Regen | lluvia; wind | vent | Wind | viento; earth | terre | Erde | tierra
day | jour | Tag | día; night | nuit | Nacht | noche; morning | matin | Morgen | mañana
year | année | Jahr | año; month | mois | Monat | mes; week | semaine | Woche | semana
man | homme | Mann | hombre; woman | femme | Frau | mujer; child | enfant | Kind | niño
boy | garçon | Junge | chico; girl | fille | Mädchen | chica; friend | ami | Freund | amigo
mother | mère | Mutter | madre; father | père | Vater | padre; sister | soeur | Schwester | hermana
brother | frère | Bruder | hermano; king | roi | König | rey; queen | reine | Königin | reina
hand | main | Hand | mano; head | tête | Kopf | cabeza; eye | oeil | Auge | ojo
nose | nez | Nase | nariz; mouth | bouche | Mund | boca; foot | pied | Fuß | pie
heart | coeur | Herz | corazón; book | livre | Buch | libro; table | table | Tisch | mesa
chair | chaise | Stuhl | silla; door | porte | Tür | puerta; window | fenêtre | Fenster | ventana
bed | lit | Bett | cama; key | clé | Schlüssel | llave; car | voiture | Auto | coche
train | train | Zug | tren; city | ville | Stadt | ciudad; street | rue | Straße | calle
school | école | Schule | escuela; red | rouge | rot | rojo; blue | bleu | blau | azul
green | vert | grün | verde; yellow | jaune | gelb | amarillo; black | noir | schwarz | negro
white | blanc | weiß | blanco; big | grand | groß | grande; small | petit | klein | pequeño
good | bon | gut | bueno; bad | mauvais | schlecht | malo; new | nouveau | neu | nuevo
old | vieux | alt | viejo; hot | chaud | heiß | caliente; cold | froid | kalt | frío
happy | heureux | glücklich | feliz; yes | oui | ja | sí; no | non | nein | no
one | un | eins | uno; two | deux | zwei | dos; three | trois | drei | tres
four | quatre | vier | cuatro; five | cinq | fünf | cinco; ten | dix | zehn | diez
hello | bonjour | hallo | hola; goodbye | au revoir | auf Wiedersehen | adiós
thank you | merci | danke | gracias; please | s'il vous plaît | bitte | por favor
love | amour | Liebe | amor; time | temps | Zeit | tiempo; world | monde | Welt | mundo
money | argent | Geld | dinero; work | travail | Arbeit | trabajo; music | musique | Musik | música
""")
LANGUAGES = ("French", "German", "Spanish")

_CATEGORY_TEXT = {
    "animal": """dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse elephant
        monkey giraffe zebra camel deer kangaroo whale dolphin shark frog snake crocodile eagle owl
        parrot penguin duck goose chicken bee ant spider butterfly turtle hamster""",
    "fruit": """apple banana pear cherry strawberry raspberry blueberry lemon lime mango peach plum
        grape pineapple kiwi melon apricot fig orange""",
    "vegetable": """carrot potato onion cabbage spinach broccoli lettuce cucumber pumpkin leek
        celery radish turnip garlic cauliflower""",
    "colour": "red blue green yellow black white purple pink brown grey",
    "country": """France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Kenya
        Norway Sweden Poland Greece Turkey Peru Chile Cuba Australia Nigeria Portugal Ireland""",
    "city": """Paris London Berlin Rome Madrid Tokyo Oslo Vienna Cairo Lima Athens Moscow Dublin
        Lisbon Prague Warsaw Nairobi Sydney Toronto Chicago Boston Milan Munich Barcelona""",
    "job": """teacher doctor nurse farmer driver painter singer baker pilot lawyer engineer dentist
        carpenter waiter plumber librarian scientist journalist actor firefighter""",
    "vehicle": """car bus train plane boat ship bicycle truck motorcycle tram helicopter van
        scooter taxi tractor submarine""",
    "clothing": "shirt hat shoe sock coat jacket scarf dress skirt trousers glove sweater jeans",
    "furniture": "table chair bed sofa desk shelf wardrobe bench cupboard stool armchair",
    "instrument": "piano guitar violin drum flute trumpet cello harp saxophone clarinet",
    "body part": "hand foot head eye ear nose mouth arm leg knee elbow finger shoulder neck",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April June July August September October November December",
}
CATEGORIES = [(word, name) for name, words in _CATEGORY_TEXT.items() for word in words.split()]


def opposite_pairs() -> list[tuple[str, str]]:
    """Both directions of OPPOSITES, each word with one answer only."""
    answers: dict[str, str] = {}
    for left, right in OPPOSITES:
        answers.setdefault(left, right)
    for left, right in OPPOSITES:
        answers.setdefault(right, left)
    return list((answers | _ONE_WAY).items())


def plural_pairs() -> list[tuple[str, str]]:
    """Singular and plural of every noun."""
    irregular = [(pair[0], pair[1]) for pair in IRREGULAR_PLURALS]
    return irregular + [(noun, noun + "s") for noun in REGULAR_NOUNS]


def word_list() -> list[str]:
    """Every single word that the word tasks (first letter, capital letters, length) may use."""
    words = {word for word, _ in CATEGORIES} | set(REGULAR_NOUNS)
    words |= {row[0] for row in TRANSLATIONS} | {word for word, _ in opposite_pairs()}
    return sorted(word for word in words if word.isalpha())
