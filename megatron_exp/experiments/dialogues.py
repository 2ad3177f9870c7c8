"""Dialogues: read from a file in SODA's layout, or made up from word lists of our own.

Both give lines of "Name: utterance" as token ids.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.json_lines import Line, read_json_lines
from megatron_exp.files import require_file
from megatron_exp.seeding import Words, key, words64

_LAYOUT = "SODA's layout: JSON lines, or a Parquet file, with the fields `dialogue` (a list of utterances) and `speakers` (a list of as many names)"
_listed = str.split

_NAMES = _listed("""
    Mara Tobin Elske Ravi Noor Casper Iben Lucho Freya Dmitri Anouk Pavel Zadie Hugo Imani Sorel Keiko Bram Thandi Oskar Leila Matteo Signe Jorah
""")
_ADJECTIVES = _listed("""
    copper careful hollow silent crooked amber patient narrow borrowed frozen velvet distant stubborn painted gentle rusty spare curious wooden
    quick pale heavy broken lucky early humble striped salty modern faded
""")
_NOUNS = _listed("""
    lantern gardener violin ledger kettle map sparrow anchor notebook tailor compass orchard bridge pilot candle mirror carpet engine parcel doctor
    ladder whistle basket statue teacher pebble ferry hammer window cousin
""")
_VERBS = _listed("hide mend carry paint follow borrow measure trade polish forget count deliver sketch guard bury open compare weigh catch")
_PLACES = _listed("harbour station attic market cellar quarry bus garden archive theatre saltworks meadow library bakery courtyard tunnel")
_TIMES = (
    "on Monday",
    "before breakfast",
    "last winter",
    "every second week",
    "after the storm",
    "at noon",
    "in late May",
    "during the strike",
)
_PATTERNS = (
    "I {verb} {number} {adjective} {noun}s in the {place}.",
    "Why would the {adjective} {noun} {verb} {number} {noun2}s there?",
    "The {noun} from the {place} arrived {time}, {adjective} as ever.",
    "Did you {verb} the {noun} {time}, or was it the {noun2}?",
    "My {noun2} says the {adjective} {noun} costs {number} coins.",
    "We should {verb} it {time}, before the {noun2} does.",
    "No, I saw {number} {noun}s near the {place} {time}.",
    "Then {verb} the {adjective} {noun2} and tell nobody in the {place}.",
)
_DRAWS_PER_LINE = 8
_FEWEST_TOKENS_PER_LINE = 6
_BLOCK = 1_000
"""Dialogues drawn at once; bounds the memory."""


class Dialogue(NamedTuple):
    """number: below 2**53, of the text, whatever its place in the file. tokens: int32. source: which line."""

    number: int
    tokens: np.ndarray
    source: str


def read_dialogues(path: Path, sizes: tuple[int, int], num: int, context: Context) -> list[Dialogue]:
    """`num` different dialogues of a file, drawn by key from those of sizes[0] to sizes[1] tokens; the order of the file has no meaning.

    Raises:
        UserError: with file and line for one that is not in SODA's layout, and where there are fewer that fit.
    """
    texts: dict[int, tuple[str, str]] = {}
    for line in _lines(Path(path)):
        text = _rendered(line)
        texts.setdefault(key(0, "dialogue", text) >> 11, (text, f"{Path(path).name}, line {line.number}"))
    numbers = np.array(sorted(texts), dtype=np.uint64)
    chosen: list[Dialogue] = []
    for index in np.argsort(words64(context.words("dialogues", "file").key, numbers), kind="stable").tolist():
        number = int(numbers[index])
        tokens = context.tokenizer.encode(texts[number][0])
        if sizes[0] <= len(tokens) <= sizes[1]:
            chosen.append(Dialogue(number, tokens, texts[number][1]))
            if len(chosen) == num:
                return chosen
    raise UserError(
        f"Experiment {context.experiment} needs {num} dialogues, but {path} has {len(chosen)} different ones of {sizes[0]} to {sizes[1]} tokens. "
        "Ask for fewer (num_per_condition, num_held_out), widen min_tokens and max_tokens, or give a larger file."
    )


def _lines(path: Path) -> Iterator[Line]:
    if path.suffix != ".parquet":
        yield from read_json_lines(path, _LAYOUT)
        return
    try:
        table = pq.read_table(require_file(path, _LAYOUT), columns=["dialogue", "speakers"])
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). Expected is {_LAYOUT}. Give another file.") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield Line(path, number, record, _LAYOUT)


def _rendered(line: Line) -> str:
    speakers, utterances = line.texts("speakers"), line.texts("dialogue")
    if len(speakers) != len(utterances):
        line.refuse(f"it has {len(utterances)} utterances and {len(speakers)} speakers")
    return "\n".join(f"{speaker}: {utterance}" for speaker, utterance in zip(speakers, utterances, strict=True))


def generated_dialogues(context: Context, cell: str, sizes: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    """int32 [sizes[i]] for i = 0, 1, ...: dialogue i of a cell, line by line, cut to its number of tokens."""
    words, sizes = context.words("dialogues", cell), np.asarray(sizes)
    num_lines = 1 + int(sizes.max()) // _FEWEST_TOKENS_PER_LINE
    for start in range(0, len(sizes), _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, len(sizes)))
        for index, drawn in zip(indices, draws(words, indices, num_lines * _DRAWS_PER_LINE), strict=True):
            yield _dialogue(drawn.reshape(num_lines, _DRAWS_PER_LINE).tolist(), int(sizes[index]), context)


def draws(words: Words, indices: np.ndarray, num: int) -> np.ndarray:
    """uint64 [len(indices), num]: row i holds `words.words(num, stream=indices[i])`."""
    return words64(words.key, np.arange(num, dtype=np.uint64)[None, :], indices.astype(np.uint64)[:, None])


def _dialogue(lines: list[list[int]], num_tokens: int, context: Context) -> np.ndarray:
    pieces: list[np.ndarray] = []
    length = 0
    for drawn in lines:
        pieces.append(context.tokenizer.encode(_line(drawn) + "\n"))
        length += len(pieces[-1])
        if length >= num_tokens:
            return np.concatenate(pieces)[:num_tokens]
    raise UserError(
        f"Experiment {context.experiment}: the tokenizer gives fewer than {_FEWEST_TOKENS_PER_LINE} tokens for a line of English text, so dialogues "
        "cannot reach max_tokens. Lower max_tokens."
    )


def _line(drawn: list[int]) -> str:
    """One utterance; a pure function of eight 64-bit words."""
    name, pattern, adjective, noun, noun2, verb, place, number_and_time = drawn
    text = _PATTERNS[pattern % len(_PATTERNS)].format(
        adjective=_ADJECTIVES[adjective % len(_ADJECTIVES)],
        noun=_NOUNS[noun % len(_NOUNS)],
        noun2=_NOUNS[noun2 % len(_NOUNS)],
        verb=_VERBS[verb % len(_VERBS)],
        place=_PLACES[place % len(_PLACES)],
        number=2 + number_and_time % 97,
        time=_TIMES[(number_and_time >> 32) % len(_TIMES)],
    )
    return f"{_NAMES[name % len(_NAMES)]}: {text}"
