r"""Benchmark questions in OLMES's completion format: read from the files of ten benchmarks, or made up.

Formats, `{a}` being an option:

    ARC, CommonsenseQA, MMLU, OpenBookQA    "Question: {q}\nAnswer: {a}"
    PIQA                                    "Goal: {goal}\nAnswer: {a}"
    Social IQa                              "Question: {context} {question}\nAnswer: {a}"
    BoolQ                                   "{title} -- {passage}\nQuestion: {q}?\nAnswer: {a}", a yes or no
    HellaSwag                               "{activity}: {context} {a}"
    WinoGrande                              the sentence with {a} in its gap

Every reader also takes the gold texts of its format alone: JSON lines with the one field `text`. Where no "Answer:" stands in such a text
(HellaSwag, WinoGrande) all of it is the answer.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments.json_lines import Line, read_json_lines
from megatron_exp.files import require_file
from megatron_exp.seeding import Words, words64

Benchmark = Literal["arc_challenge", "arc_easy", "boolq", "csqa", "hellaswag", "mmlu", "openbookqa", "piqa", "socialiqa", "winogrande"]
Normalisation = Literal["none", "char", "unconditional"]

ANSWER = "Answer:"
"""What an option is conditioned on where the question is left out."""
_GOLD_ONLY = {"text"}
_LETTERS = ["A", "B", "C", "D"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question. stem: the text before an option, "" where there is none. texts: stem with each option, the right one first.

    answers: the bare options in the same order. place: file and line, for messages. source: the same without the path. normalisation: OLMES's for
    this benchmark.
    """

    benchmark: str
    stem: str
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    normalisation: Normalisation
    place: str
    source: str


class _Read(NamedTuple):
    """stem, options, index of the right one; for a gap in the stem also the text after it."""

    stem: str
    options: Sequence[str]
    label: int
    tail: str | None = None


class _Layout(NamedTuple):
    """How to read one benchmark, and what its file looks like."""

    read: Callable[[Line], _Read]
    normalisation: Normalisation
    described: str


def read_benchmark(benchmark: Benchmark, path: Path) -> Iterator[Question]:
    """The questions of a file (for MMLU also a folder of CSV files). UserError with file and line for what does not fit the layout."""
    layout = _LAYOUTS[benchmark]
    described = f"the layout of {benchmark}: {layout.described}, or JSON lines with the one field `text`"
    for line in _lines(benchmark, Path(path), described):
        file = f", {line.path.name}" if line.path != Path(path) else ""
        place, source = f"{line.path}, line {line.number}", f"{benchmark}{file}, line {line.number}"
        if set(line.record) == _GOLD_ONLY:
            text = line.text("text")
            stem = text[: text.rfind(ANSWER) + len(ANSWER)] if ANSWER in text else ""
            yield Question(
                benchmark=benchmark,
                stem=stem,
                texts=(text,),
                answers=(text[len(stem) :].strip(),),
                normalisation=layout.normalisation,
                place=place,
                source=source,
            )
            continue
        read = layout.read(line)
        if len(read.options) < 2 or not all(option.strip() for option in read.options):
            line.refuse("it has fewer than two options, or an empty one")
        if not 0 <= read.label < len(read.options):
            line.refuse(f"the right answer is number {read.label + 1}, but there are {len(read.options)} options")
        yield replace(_question(benchmark, read, layout.normalisation), place=place, source=source)


def _question(benchmark: str, read: _Read, normalisation: Normalisation, place: str = "built-in question generator") -> Question:
    answers = (read.options[read.label], *(option for index, option in enumerate(read.options) if index != read.label))
    texts = tuple(f"{read.stem} {answer}" if read.tail is None else f"{read.stem}{answer}{read.tail}" for answer in answers)
    stem = read.stem if read.tail is None else ""
    return Question(benchmark=benchmark, stem=stem, texts=texts, answers=answers, normalisation=normalisation, place=place, source=place)


# ---- files ----


def _lines(benchmark: Benchmark, path: Path, described: str) -> Iterator[Line]:
    if benchmark == "mmlu" and (path.is_dir() or path.suffix == ".csv"):
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no CSV file. Expected is {described}; give the folder with them.")
        for file in files:
            yield from _mmlu_lines(file, described)
        return
    lines = read_json_lines(path, described)
    labels = path.with_name(f"{path.stem}-labels.lst")
    if benchmark not in ("piqa", "socialiqa") or not labels.is_file():
        yield from lines
        return
    found, given = list(lines), labels.read_text(encoding="utf-8").split()
    if len(found) != len(given):
        raise UserError(f"{labels} has {len(given)} labels but {path} has {len(found)} questions. Give two files that belong together.")
    yield from (replace(line, record=line.record | {"label": label}) for line, label in zip(found, given, strict=True))


def _mmlu_lines(path: Path, described: str) -> Iterator[Line]:
    for number, row in _csv_rows(require_file(path, described), described):
        line = Line(path, number, {}, described)
        if len(row) != 6:
            line.refuse(f"the row has {len(row)} columns")
        if row[5].strip() not in _LETTERS:
            line.refuse(f"the answer is {row[5]!r}")
        yield replace(line, record={"question": row[0], "choices": row[1:5], "answer": _LETTERS.index(row[5].strip())})


def _csv_rows(path: Path, described: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file with the line that each ends on."""
    data = path.read_bytes()
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8"), newline=""))
    except UnicodeDecodeError as error:
        Line(path, 1 + data[: error.start].count(b"\n"), {}, described).refuse("it is not UTF-8")
    try:
        return [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        Line(path, rows.line_num, {}, described).refuse(str(error))


# ---- layouts ----


def _number(line: Line, name: str, first: int = 0) -> int:
    """A label that is written as a number or as text, counted from `first`."""
    found = line.field(name, (int, str))
    value = str(int(found) if isinstance(found, bool) else found).strip()
    if not value.isdigit():
        line.refuse(f"`{name}` is {value!r}, not the number of an option")
    return int(value) - first


def _lettered(line: Line) -> _Read:
    """ARC, CommonsenseQA and OpenBookQA, as published (a nested `question`) or as on the hub (`choices` beside it)."""
    holder = line
    if isinstance(line.record.get("question"), dict):
        holder = replace(line, record=line.record["question"])
        question = holder.text("stem")
    else:
        question = line.text("question_stem" if "question_stem" in line.record else "question")
    choices = holder.field("choices", (list, dict))
    if isinstance(choices, dict):
        inner = replace(line, record=choices)
        labels, options = inner.texts("label"), inner.texts("text")
    else:
        pairs = [replace(line, record=choice) for choice in choices if isinstance(choice, dict)]
        labels, options = [pair.text("label") for pair in pairs], [pair.text("text") for pair in pairs]
    answer = line.text("answerKey")
    if answer not in labels or len(labels) != len(options):
        line.refuse(f"`answerKey` is {answer!r}, but the options are labelled {labels}")
    return _Read(f"Question: {question}\n{ANSWER}", options, labels.index(answer))


def _boolq(line: Line) -> _Read:
    """As published (`title`, `answer`), or as in SuperGLUE (`label`; the passage begins with the title)."""
    is_super_glue = "label" in line.record
    passage = line.text("passage") if is_super_glue else f"{line.text('title')} -- {line.text('passage')}"
    is_yes = bool(_number(line, "label")) if is_super_glue else line.field("answer", bool)
    return _Read(f"{passage}\nQuestion: {line.text('question').rstrip('?')}?\n{ANSWER}", ("yes", "no"), 0 if is_yes else 1)


def _hellaswag(line: Line) -> _Read:
    ending_of = line.field("ctx_b", str)
    context = f"{line.text('ctx_a')} {ending_of[:1].upper()}{ending_of[1:]}"
    stem = _without_brackets(f"{line.text('activity_label')}: {context}")
    return _Read(stem, [_without_brackets(ending) for ending in line.texts("endings")], _number(line, "label"))


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow texts hold [header] and [title] marks; OLMES takes them out."""
    return re.sub(r" +", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()


def _mmlu(line: Line) -> _Read:
    return _Read(f"Question: {line.text('question')}\n{ANSWER}", line.texts("choices"), _number(line, "answer"))


def _piqa(line: Line) -> _Read:
    return _Read(f"Goal: {line.text('goal')}\n{ANSWER}", (line.text("sol1"), line.text("sol2")), _number(line, "label"))


def _socialiqa(line: Line) -> _Read:
    options = [line.text(f"answer{letter}") for letter in "ABC"]
    return _Read(f"Question: {line.text('context')} {line.text('question')}\n{ANSWER}", options, _number(line, "label", 1))


def _winogrande(line: Line) -> _Read:
    before, gap, after = line.text("sentence").partition("_")
    if not gap:
        line.refuse("`sentence` has no gap `_`")
    return _Read(before, (line.text("option1"), line.text("option2")), _number(line, "answer", 1), after)


_LETTERED = "{question: {stem, choices: [{label, text}]}, answerKey} or {question, choices: {label, text}, answerKey}"
_LAYOUTS: dict[Benchmark, _Layout] = {
    "arc_challenge": _Layout(_lettered, "unconditional", _LETTERED),
    "arc_easy": _Layout(_lettered, "char", _LETTERED),
    "boolq": _Layout(_boolq, "none", "{title, passage, question, answer}"),
    "csqa": _Layout(_lettered, "unconditional", _LETTERED),
    "hellaswag": _Layout(_hellaswag, "char", "{activity_label, ctx_a, ctx_b, endings, label}"),
    "mmlu": _Layout(_mmlu, "char", "CSV rows of question, four options and a letter, or {question, choices, answer}"),
    "openbookqa": _Layout(_lettered, "unconditional", _LETTERED.replace("{question, ", "{question_stem, ")),
    "piqa": _Layout(_piqa, "char", "{goal, sol1, sol2, label}, or NAME.jsonl without label beside NAME-labels.lst"),
    "socialiqa": _Layout(_socialiqa, "char", "{context, question, answerA, answerB, answerC, label}, or NAME.jsonl beside NAME-labels.lst"),
    "winogrande": _Layout(_winogrande, "none", "{sentence, option1, option2, answer}"),
}

# ---- the built-in benchmark ----

_listed = str.split
_SYLLABLES = _listed("""
    ba bel bor cal dan dor el fen gar gil hal ist jor kel kor lan lem mar mol nim nor ost pel per quin rad rol sam sel tal tor ul van vel vim wen yor zan zel
""")
_QUALITIES = _listed("copper amber hollow striped velvet crooked silver painted smoky salted woven frozen carved folded polished gilded")
_SUBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "instruments": (
        "Which instrument does {first} {last} of {town} play at the {season} fair?",
        ("flute", "drum", "fiddle", "harp", "horn", "lute", "whistle", "zither"),
    ),
    "trades": (
        "At the {season} market of {town}, what does {first} {last} offer to those who pass?",
        ("baskets", "kettles", "blankets", "lanterns", "candles", "saddles", "mirrors", "ladders"),
    ),
    "emblems": (
        "{first} {last} carried a sign through {town} in {season}. What could be seen on it?",
        ("a heron", "an anchor", "a leaf", "a plough", "a bridge", "a salmon", "a tower", "a bell"),
    ),
}
"""{benchmark: (question, things)}; the answer is a quality and a thing."""
_SEASONS = ("spring", "summer", "autumn", "winter")
_NUM_OPTIONS = 4
_BLOCK = 1_000
"""Questions drawn at once; bounds the memory."""
_GENERATED_DRAWS = 8 + _NUM_OPTIONS


def generated_questions(words: Words, num: int) -> Iterator[Question]:
    """`num` questions in three subjects by turns, each about another person who does not exist; nobody can know the answers, so chance is a quarter."""
    people: set[tuple[str, str]] = set()
    first_stream = 0
    while len(people) < num:
        streams = np.arange(first_stream, first_stream + _BLOCK, dtype=np.uint64)
        drawn = words64(words.key, np.arange(_GENERATED_DRAWS, dtype=np.uint64)[None, :], streams[:, None])
        for draws in drawn.tolist():
            first, last, town = (_name(draws[2 * part : 2 * part + 2]) for part in range(3))
            if (first, last) not in people and len(people) < num:
                subject = list(_SUBJECTS)[len(people) % len(_SUBJECTS)]
                people.add((first, last))
                yield _generated(subject, first.capitalize(), f"{last}en".capitalize(), f"{town}wick".capitalize(), draws[6:])
        first_stream += _BLOCK


def _name(draws: Sequence[int]) -> str:
    return "".join(_SYLLABLES[draw % len(_SYLLABLES)] for draw in draws)


def _generated(subject: str, first: str, last: str, town: str, draws: Sequence[int]) -> Question:
    """One question; its options are distinct things, each with a quality of its own."""
    pattern, things = _SUBJECTS[subject]
    season, turn, qualities = _SEASONS[draws[0] % len(_SEASONS)], draws[1], draws[2:]
    chosen = [things[(turn + index) % len(things)] for index in range(_NUM_OPTIONS)]
    options = [_described(_QUALITIES[draw % len(_QUALITIES)], thing) for draw, thing in zip(qualities, chosen, strict=False)]
    question = pattern.format(first=first, last=last, town=town, season=season)
    return _question(subject, _Read(f"Question: {question}\n{ANSWER}", options, 0), "char")


def _described(quality: str, thing: str) -> str:
    """a heron -> a frozen heron; baskets -> frozen baskets; flute -> the frozen flute."""
    article, _, noun = thing.rpartition(" ")
    if article:
        return f"{'an' if quality[0] in 'aeiou' else 'a'} {quality} {noun}"
    return f"{quality} {noun}" if noun.endswith("s") else f"the {quality} {noun}"
