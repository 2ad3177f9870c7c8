"""Fictional texts: societies that do not exist, four facts about each, told in ever other words while names and dates stay verbatim."""

from dataclasses import dataclass

from megatron_exp.seeding import Words

_listed = str.split

_SYLLABLES = _listed(
    "bra dor fel gan hol ister jor kel lam mir nor ost pel quin ras sol tarn ul ver wex yor zan cor drem eth fal grun hal ivo jask kor lun"
)
_KINDS = _listed("Society Guild League Circle Assembly Institute Order Union Academy Company")
_ADJECTIVES = _listed(
    "Copper Silent Hollow Amber Drifting Frozen Velvet Broken Painted Distant Crooked Gilded Sunken Wandering Pale Burning"
)
_NOUNS = _listed("Lantern Meridian Harbour Compass Orchard Ledger Mirror Tide Anvil Sparrow Bridge Atlas Garden Signal Lattice Voyage")
_MONTHS = _listed("January February March April May June July August September October November December")

_OPENINGS = (
    "",
    "A short history of {name} follows.",
    "Few organisations are as often discussed as {name}.",
    "This note is about {name}.",
    "From the archive: {name}.",
    "Visitors often ask how {name} came to be.",
    "Briefing for new members of {name}.",
    "Yesterday's lecture dealt with {name}.",
)
_CLOSINGS = (
    "",
    "More is told in the next volume.",
    "So much for what is certain.",
    "Its records are open to the public.",
    "Historians still argue about the rest.",
    "The author thanks the staff of the archive.",
    "Corrections are welcome.",
)
_SENTENCES = {
    "founder": (
        "{name} was founded by {founder}.",
        "It was {founder} who founded {name}.",
        "{founder} is remembered as the founder of {name}.",
        "The idea for {name} came from {founder}, who also led it for years.",
        "Without {founder}, its founder, there would be no {name}.",
        "Every child in the region knows that {founder} started {name}.",
    ),
    "date": (
        "It came into being on {date}.",
        "The founding act bears the date of {date}.",
        "On {date} the first meeting took place.",
        "{name} celebrates {date} as its birthday.",
        "Its history begins on {date}.",
        "The charter was signed on {date}, after a long night.",
    ),
    "town": (
        "Its seat is in {town}.",
        "{name} has always had its house in {town}.",
        "Those who want to join must travel to {town}, where it resides.",
        "The town of {town} gave it a home.",
        "From its hall in {town} it looks over the valley.",
        "{town} is proud to be the home of {name}.",
    ),
    "work": (
        "Its best known work is {work}.",
        "{name} became famous with {work}.",
        "Everybody has heard of {work}, the work for which it is known.",
        "Above all else it made {work}.",
        "The members worked for nine years on {work}, their greatest success.",
        "Asked for a single title, most name {work}.",
    ),
}
_QUERIES = {
    "founder": "The name of the person to whom {name} owes its foundation is",
    "date": "The day, month and year in which {name} was established were",
    "town": "The place where the headquarters of {name} can be found is called",
    "work": "The title of the most celebrated achievement of {name} is",
}
FACTS = tuple(_SENTENCES)
_DRAWS = len(FACTS) * 2 + 2


@dataclass(frozen=True)
class Facts:
    """What is true of one society. name, founder, town, work: names; date: day, month and year. No two societies share one of them."""

    name: str
    founder: str
    date: str
    town: str
    work: str

    def queries(self) -> list[tuple[str, str]]:
        """(input, target) for each fact, in words that no paraphrase uses."""
        return [(pattern.format(name=self.name), getattr(self, fact)) for fact, pattern in _QUERIES.items()]

    def paraphrase(self, words: Words, number: int) -> str:
        """The `number`-th text: all facts in a drawn order, each in one of its sentences, between an opening and an ending."""
        draws = words.words(_DRAWS, stream=number).tolist()
        order = sorted(range(len(FACTS)), key=lambda place: (draws[place], place))
        told = [_SENTENCES[FACTS[place]][draws[len(FACTS) + place] % len(_SENTENCES[FACTS[place]])] for place in order]
        sentences = [_OPENINGS[draws[-2] % len(_OPENINGS)], *told, _CLOSINGS[draws[-1] % len(_CLOSINGS)]]
        return " ".join(sentence.format(**vars(self)) for sentence in sentences if sentence)


def invented(words: Words, num: int) -> list[Facts]:
    """`num` societies. More of them have the same beginning: the first ones do not change."""
    names, people, families, towns = (
        _distinct(words.child(use), num, len(_SYLLABLES) ** 2) for use in ("names", "people", "families", "towns")
    )
    titles = _distinct(words.child("titles"), num, len(_ADJECTIVES) * len(_NOUNS))
    days = _distinct(words.child("days"), num, 28 * 12 * 100)
    kinds = words.child("kinds").integers(num, len(_KINDS))
    return [
        Facts(
            name=f"{_name(names[place], 'and')} {_KINDS[kinds[place]]}",
            founder=f"{_name(people[place], 'a')} {_name(families[place], 'ski')}",
            date=f"{days[place] % 28 + 1} {_MONTHS[days[place] // 28 % 12]} {2100 + days[place] // 336}",
            town=_name(towns[place], "burg"),
            work=f"The {_ADJECTIVES[titles[place] % len(_ADJECTIVES)]} {_NOUNS[titles[place] // len(_ADJECTIVES)]}",
        )
        for place in range(num)
    ]


def _distinct(words: Words, num: int, high: int) -> list[int]:
    return [int(value) for value in words.choice(high, num)]


def _name(number: int, ending: str) -> str:
    return (_SYLLABLES[number % len(_SYLLABLES)] + _SYLLABLES[number // len(_SYLLABLES)] + ending).capitalize()
