"""News articles: read from files in MUSE's layout, or made up from word lists of our own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_exp.experiments.json_lines import Line, read_json_lines
from megatron_exp.seeding import Words

_LAYOUT = "MUSE's layout: JSON lines with the field `text`, and `questions` [{`question`, `answer`}] if there are any"
_listed = str.split

_NAMES = _listed("""
    Adriel Benka Corvin Dalia Edrik Fenna Goran Halima Isolde Janko Kavita Lorenz Mireille Nadim Odette Perrin Quilla Rasmus Sabela Teodor Ulrike Vasco Wilma
    Yannis Zuleika
""")
_SURNAMES = _listed("""
    Abernak Boltwin Castrel Dunmere Eskander Farlow Grenholt Hartlin Ivarsen Jessop Kolbrand Lindqar Marwick Norrano Oldroyd Penhallow Quarrie Rostand Selwick
    Tamsett Ulvar Venning Wexcombe Yarrel Zimbar
""")
_TOWNS = _listed("""
    Ashcombe Brellin Carvane Dornholm Eastmere Fallowby Grantham Hollerdale Inverlow Jarrowmouth Kestrelton Larkhaven Millbrae Northolt Orrinford Pellworth
    Quayside Redminster Stavely Thornquay Upwell Varnsea Westerlough Yoxley
""")
_BODIES = _listed(
    "council hospital railway university theatre harbour library museum shipyard brewery orchestra school court airport charity union farm bank"
)
_TOPICS = _listed(
    "flood strike budget merger festival bridge vaccine election drought tunnel recall heatwave inquiry strike auction rescue fire stadium ferry"
)
_QUALITIES = _listed(
    "sudden costly modest disputed record temporary unusual delayed secret public severe lasting minor welcome divisive technical"
)
_WHEN = _listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday January March April June August October December")
_PATTERNS = (
    "The {body} in {town} said on {when} that the {quality} {topic} would cost {number} million crowns.",
    "{name} {surname}, who leads the {body}, called the {topic} {quality} and asked for {number} more days.",
    "About {number} people gathered outside the {body} after news of the {topic} reached {town}.",
    "A report by {name} {surname} found {number} faults in the way the {body} had handled the {topic}.",
    '"Nobody in {town} expected a {quality} {topic}," said {name} {surname}, {number}, a resident.',
    "By {when} the {topic} had spread to {number} districts, and the {body} closed its doors.",
    "Officials in {town} denied that {name} {surname} had been told of the {quality} plan for the {body}.",
    "In {when} the {body} will vote on the {topic}, the first such vote in {number} years.",
    "{surname} added that the {body} of {town} had learned from the {quality} {topic} of {number} years ago.",
    "The {topic} comes {number} weeks after the {body} dismissed {name} {surname} over a {quality} remark.",
)
_HEADLINE = "{town} {body} faces {quality} {topic}, says {surname}"
_DRAWS = 9
_SENTENCES_PER_PARAGRAPH = 3


@dataclass(frozen=True)
class Article:
    """One article.

    part: the set of articles it belongs to, such as `forget`. source: which line of the set. num_tokens: of its text to use, 0 where nobody said.
    questions: (question, answer) about it.
    """

    part: str
    text: str
    source: str
    num_tokens: int = 0
    questions: tuple[tuple[str, str], ...] = ()


def read_articles(files: Mapping[str, Path]) -> Iterator[Article]:
    """The articles of every set, blank ones left out. UserError with file and line for a line that is not in MUSE's layout."""
    for part, path in files.items():
        for line in read_json_lines(Path(path), _LAYOUT):
            if text := line.field("text", str).strip():
                yield Article(part, text, f"{part}, line {line.number}", questions=_questions(line))


def _questions(line: Line) -> tuple[tuple[str, str], ...]:
    found = line.field("questions", list) if "questions" in line.record else []
    inner = [
        replace(line, record=one) if isinstance(one, dict) else line.refuse("`questions` holds something else than objects")
        for one in found
    ]
    return tuple((one.text("question"), one.text("answer")) for one in inner)


def generated_article(words: Words, number: int, num_sentences: int) -> str:
    """One article: a headline and paragraphs of three sentences, all names and numbers drawn."""
    draws = words.words((num_sentences + 1) * _DRAWS, stream=number).reshape(-1, _DRAWS).tolist()
    sentences = [_sentence(_PATTERNS[row[0] % len(_PATTERNS)], row) for row in draws[1:]]
    paragraphs = [
        " ".join(sentences[start : start + _SENTENCES_PER_PARAGRAPH]) for start in range(0, num_sentences, _SENTENCES_PER_PARAGRAPH)
    ]
    return "\n\n".join([_sentence(_HEADLINE, draws[0]), *paragraphs])


def _sentence(pattern: str, draws: list[int]) -> str:
    lists = (_NAMES, _SURNAMES, _TOWNS, _BODIES, _TOPICS, _QUALITIES, _WHEN)
    chosen = [words[draw % len(words)] for words, draw in zip(lists, draws[1:], strict=False)]
    filled = dict(zip(("name", "surname", "town", "body", "topic", "quality", "when"), chosen, strict=True))
    return pattern.format(number=11 + draws[8] % 88, **filled)
