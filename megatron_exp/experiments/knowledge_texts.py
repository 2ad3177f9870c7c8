"""Fictional texts with paraphrases and queries: from files, or invented.

Layouts of `paraphrases`: the Fictional Knowledge data as published (a JSON list of {train_context, gen_input, gen_target, ...}, with or without
`paraphrases`), or JSON lines {id, text}: one paraphrase of the text `id` a line. Layout of `queries`: JSON lines {input, target}, with `id` where a
line belongs to a named text. Without an `id` a query belongs to the text that holds its target and shares most words with its input.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_exp.errors import UserError
from megatron_exp.experiments.fictional_facts import invented
from megatron_exp.experiments.json_lines import Line, read_json_lines
from megatron_exp.files import require_file
from megatron_exp.seeding import Words, key

_PARAPHRASES = "the Fictional Knowledge data (a JSON list), or JSON lines {id, text}, one paraphrase a line"
_QUERIES = "JSON lines {input, target}, with `id` where the query belongs to a named text"
_OWN_QUERIES = ("gen_input", "gen_target")
"""Of the three kinds of queries in Fictional Knowledge those in other words than the text: one kind quotes it, the third has targets not in it."""
_UNUSED_BITS = 12  # item numbers lie below 2**53
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Text:
    """One fictional text. name: as people know it. number: a hash of the name. is_queried: whether the file of queries asks about it."""

    name: str
    paraphrases: tuple[str, ...]
    queries: tuple[tuple[str, str], ...]
    is_queried: bool = False

    @property
    def number(self) -> int:
        return key(0, "knowledge", "text", self.name) >> _UNUSED_BITS

    def numbered_paraphrases(self) -> list[tuple[int, str]]:
        """(item number, text); the number is a hash of the text, so the order of lines has no meaning. A text that stands there twice has two."""
        seen: Counter[str] = Counter()
        numbers = []
        for text in self.paraphrases:
            numbers.append(key(0, "knowledge", "paraphrase", self.name, text, seen[text]) >> _UNUSED_BITS)
            seen[text] += 1
        return list(zip(numbers, self.paraphrases, strict=True))

    def numbered_queries(self) -> list[tuple[int, str, str]]:
        """(item number, input, target)."""
        return [(key(0, "knowledge", "query", self.name, *query) >> _UNUSED_BITS, *query) for query in self.queries]


def invented_texts(words: Words, num: int, num_paraphrases: int) -> list[Text]:
    """Texts of the built-in generator."""
    found = []
    for place, facts in enumerate(invented(words.child("facts"), num)):
        drawn = words.child("paraphrases", place)
        texts = tuple(facts.paraphrase(drawn, number) for number in range(num_paraphrases))
        found.append(Text(f"society {place}", texts, tuple(facts.queries())))
    return found


def read_texts(paraphrases: Path, queries: Path | None) -> list[Text]:
    """The texts of files; UserError with file and line for another layout, a target no paraphrase holds, or a query about no text."""
    path = require_file(Path(paraphrases), _PARAPHRASES)
    with open(path, "rb") as file:
        is_list = file.read(64).lstrip().startswith(b"[")
    texts = _published(path) if is_list else _lines(path)
    if queries is not None:
        texts = _with_queries(texts, Path(queries))
    elif not is_list:
        raise UserError(f"{path} has paraphrases and no queries. Give `queries`: a file of {_QUERIES}.")
    for text in texts:
        _check_targets(path, text)
    return texts


def _published(path: Path) -> list[Text]:
    try:
        entries = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Expected is {_PARAPHRASES}. Correct the file or give another.") from error
    return [_entry(path, number, entry) for number, entry in enumerate(entries)]


def _entry(path: Path, number: int, entry: Any) -> Text:
    columns: dict[str, Any] = {}
    for name in ("train_context", *_OWN_QUERIES, "paraphrases"):
        value = entry.get(name, [] if name == "paraphrases" else None) if isinstance(entry, dict) else None
        kind = str if name == "train_context" else list
        if not isinstance(value, kind) or (kind is list and not all(isinstance(one, str) for one in value)):
            raise UserError(
                f"{path}, entry {number}: `{name}` is missing or of the wrong type. Expected is {_PARAPHRASES}. Correct the entry."
            )
        columns[name] = value
    inputs, targets = (columns[name] for name in _OWN_QUERIES)
    if len(inputs) != len(targets):
        raise UserError(f"{path}, entry {number}: {len(inputs)} inputs and {len(targets)} targets. Give a target for each input.")
    own = tuple((text.strip(), target.strip()) for text, target in zip(inputs, targets, strict=True))
    return Text(f"entry {number}", (columns["train_context"], *columns["paraphrases"]), own)


def _lines(path: Path) -> list[Text]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in read_json_lines(path, _PARAPHRASES):
        found[_id(line)].append(line.text("text"))
    return [Text(name, tuple(texts), ()) for name, texts in found.items()]


def _id(line: Line) -> str:
    value = line.record.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        line.refuse("`id` is missing, or neither a text nor a whole number")
    return str(value)


def _with_queries(texts: list[Text], path: Path) -> list[Text]:
    """The texts, those that the file asks about with its queries instead of their own."""
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    names = {text.name for text in texts}
    for line in read_json_lines(path, _QUERIES):
        query = line.text("input"), line.text("target")
        name = _id(line) if "id" in line.record else _owner(texts, line, *query)
        name = name if name in names else f"entry {name}"
        if name not in names:
            line.refuse(f"there is no text {line.record['id']!r}")
        if query in asked[name]:
            line.refuse("the same query stands there before")
        asked[name].append(query)
    return [Text(one.name, one.paraphrases, tuple(asked[one.name]), True) if one.name in asked else one for one in texts]


def _owner(texts: Iterable[Text], line: Line, text: str, target: str) -> str:
    """The text that a query without `id` is about."""
    wanted = _words(text)
    holding = [one for one in texts if target.lower() in one.paraphrases[0].lower()]
    shared = sorted(((len(wanted & _words(one.paraphrases[0])), one.name) for one in holding), reverse=True)
    if not shared or (len(shared) > 1 and shared[0][0] == shared[1][0]):
        problem = "no text holds its target" if not shared else f"{shared[0][1]} and {shared[1][1]} fit it equally well"
        line.refuse(f"{problem}; give it the `id` of its text")
    return shared[0][1]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _check_targets(path: Path, text: Text) -> None:
    """Paraphrases must keep what is asked for: a target that stands in none of them cannot be learned from them."""
    everything = "\n".join(text.paraphrases).lower()
    lost = [target for _, target in text.queries if target.lower() not in everything]
    if lost:
        raise UserError(
            f"{path}: the target {lost[0]!r} stands in no paraphrase of {text.name}, so it cannot be learned from them. Paraphrases must keep names and dates "
            "as they are: correct them, or leave the query out."
        )
