"""The facts that the quickstart model knows. Standard library only, no data from elsewhere."""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("english", "french", "german", "spanish")
LARGEST_NUMBER = 100


class Place(NamedTuple):
    """A country, its capital and its continent (`""` where that is a matter of opinion)."""

    country: str
    capital: str
    continent: str


_PLACES_BY_CONTINENT = {
    "Europe": (
        "Albania:Tirana, Austria:Vienna, Belgium:Brussels, Bulgaria:Sofia, Croatia:Zagreb, Czechia:Prague, "
        "Denmark:Copenhagen, Estonia:Tallinn, Finland:Helsinki, France:Paris, Germany:Berlin, Greece:Athens, "
        "Hungary:Budapest, Iceland:Reykjavik, Ireland:Dublin, Italy:Rome, Latvia:Riga, Lithuania:Vilnius, "
        "Malta:Valletta, Norway:Oslo, Poland:Warsaw, Portugal:Lisbon, Romania:Bucharest, Serbia:Belgrade, "
        "Slovakia:Bratislava, Slovenia:Ljubljana, Spain:Madrid, Sweden:Stockholm, Switzerland:Bern, Ukraine:Kyiv"
    ),
    "Asia": (
        "Bangladesh:Dhaka, Cambodia:Phnom Penh, China:Beijing, India:New Delhi, Indonesia:Jakarta, Iran:Tehran, "
        "Iraq:Baghdad, Japan:Tokyo, Jordan:Amman, Lebanon:Beirut, Malaysia:Kuala Lumpur, Mongolia:Ulaanbaatar, "
        "Nepal:Kathmandu, Pakistan:Islamabad, Qatar:Doha, South Korea:Seoul, Thailand:Bangkok, Vietnam:Hanoi"
    ),
    "Africa": (
        "Algeria:Algiers, Angola:Luanda, Botswana:Gaborone, Ethiopia:Addis Ababa, Ghana:Accra, Kenya:Nairobi, "
        "Libya:Tripoli, Madagascar:Antananarivo, Mali:Bamako, Morocco:Rabat, Mozambique:Maputo, Namibia:Windhoek, "
        "Nigeria:Abuja, Rwanda:Kigali, Senegal:Dakar, Somalia:Mogadishu, Sudan:Khartoum, Tunisia:Tunis, "
        "Uganda:Kampala, Zambia:Lusaka, Zimbabwe:Harare"
    ),
    "North America": (
        "Canada:Ottawa, Costa Rica:San Jose, Cuba:Havana, Honduras:Tegucigalpa, Jamaica:Kingston, "
        "Mexico:Mexico City, Nicaragua:Managua"
    ),
    "South America": (
        "Argentina:Buenos Aires, Brazil:Brasilia, Chile:Santiago, Colombia:Bogota, Ecuador:Quito, "
        "Paraguay:Asuncion, Peru:Lima, Uruguay:Montevideo, Venezuela:Caracas"
    ),
    "Oceania": "Australia:Canberra, Fiji:Suva, New Zealand:Wellington",
    "": "Egypt:Cairo, Russia:Moscow, Turkey:Ankara, Kazakhstan:Astana, Georgia:Tbilisi",
}

PLACES = tuple(
    Place(country, capital, continent)
    for continent, row in _PLACES_BY_CONTINENT.items()
    for country, capital in (pair.split(":") for pair in row.split(", "))
)

# Names of the training data, and names that only the held-out data has.
NAMES = tuple(
    "Anna Maria Peter Paul John James Robert Michael David Thomas Daniel Laura Julia Sophie Emma Olivia Lucas Hugo "
    "Louis Pierre Marie Claire Camille Nicolas Antoine Hans Klaus Greta Heidi Otto Fritz Jonas Felix Lena Carlos "
    "Pablo Lucia Elena Diego Sofia Javier Carmen Rosa Miguel Ivan Olga Nina Boris Yuki Kenji Hana Akira Wei Ling Chen "
    "Raj Priya Anil Sita Omar Fatima Ali Leila Hassan Amina Kofi Ama Zola Nia Jane Mary Alice Grace Henry George "
    "Edward Oscar Arthur Frank Walter Victor Martin Simon Adam Eva Clara Martha Helen Irene Diana Monica Teresa Linda "
    "Susan Karen Nancy Ruth Sarah Rachel Leah Noah Liam Ethan Logan Mason Jacob Samuel Benjamin Alexander Sebastian "
    "Isabella Charlotte Amelia Harper Evelyn Abigail Emily Elizabeth Ella Avery Scarlett Victoria Madison".split()
)
HELD_OUT_NAMES = tuple(
    "Matilda Gustav Beatrice Rafael Ingrid Bruno Valentina Tobias Marisol Dmitri Aisha Kwame Naomi Theodore Penelope "
    "Stefan Astrid Lorenzo Yasmin Magnus Celeste Rohan Mei Tariq Wanda Edgar Flora Gilbert Hilda Jasper".split()
)
SURNAMES = tuple(
    "Smith Jones Brown Taylor Wilson Lopez Garcia Martinez Muller Schmidt Weber Fischer Dubois Moreau Laurent Bernard "
    "Rossi Novak Ivanov Tanaka Suzuki Kim Singh Patel Khan Okafor Mensah Silva Costa Andersen Larsen Virtanen".split()
)

GOOD_WORDS = (
    "good great excellent wonderful fantastic amazing lovely delightful brilliant superb perfect pleasant beautiful "
    "charming impressive enjoyable outstanding tasty friendly helpful comfortable marvelous"
).split()
BAD_WORDS = (
    "bad terrible awful horrible dreadful poor disappointing boring disgusting ugly unpleasant annoying useless broken "
    "dirty rude slow nasty miserable painful weak uncomfortable"
).split()
GOOD_VERBS = "love like enjoy adore admire recommend appreciate".split()
BAD_VERBS = "hate dislike regret despise detest loathe avoid".split()
THINGS = (
    "film movie book meal hotel song concert phone game service food room staff show trip soup coffee restaurant car "
    "park lesson story play weather product museum dinner bike camera train beach city garden party".split()
)

_ENGLISH_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_FRENCH_UNITS = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf"
).split()
_FRENCH_TENS = "vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt".split()
_GERMAN_UNITS = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
_GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_SPANISH_UNITS = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
).split()
_SPANISH_TENS = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()


def _english(number: int) -> str:
    tens, units = divmod(number, 10)
    if tens < 2:
        return _ENGLISH_UNITS[number]
    return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH_UNITS[units]}" if units else "")


def _french(number: int) -> str:
    tens, units = divmod(number, 10)
    if tens < 2:
        return _FRENCH_UNITS[number]
    if tens in (7, 9):
        units += 10
    if number == 80:
        return "quatre-vingts"
    if units == 0:
        return _FRENCH_TENS[tens - 2]
    joint = " et " if units in (1, 11) and tens < 8 else "-"
    return _FRENCH_TENS[tens - 2] + joint + _FRENCH_UNITS[units]


def _german(number: int) -> str:
    tens, units = divmod(number, 10)
    if tens < 2:
        return _GERMAN_UNITS[number]
    unit = "ein" if units == 1 else _GERMAN_UNITS[units]
    return (f"{unit}und" if units else "") + _GERMAN_TENS[tens - 2]


def _spanish(number: int) -> str:
    if number < 30:
        return _SPANISH_UNITS[number]
    tens, units = divmod(number, 10)
    return _SPANISH_TENS[tens - 3] + (f" y {_SPANISH_UNITS[units]}" if units else "")


def number_in_words(number: int, language: str) -> str:
    """Write a number from 0 to 100 in words of one of `LANGUAGES`."""
    if number == LARGEST_NUMBER:
        return {"english": "one hundred", "french": "cent", "german": "hundert", "spanish": "cien"}[language]
    return {"english": _english, "french": _french, "german": _german, "spanish": _spanish}[language](number)
