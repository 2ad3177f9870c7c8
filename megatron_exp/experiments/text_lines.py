"""The file of the experiment `texts`: its lines as token ids, with every mistake refused by file, line and remedy."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.json_lines import Line, read_json_lines
from megatron_exp.seeding import key

FIELDS = ("id", "text", "token_ids", "group", "cluster", "prompt", "target", "choices")
_LAYOUTS = {
    "completion": 'one object a line such as {"id": "a", "prompt": "The river Kelp ends in", "target": " Lake Odran."}',
    "choice": 'one object a line such as {"id": "a", "prompt": "The Kelp ends in", "target": " Lake Odran.", "choices": [" Lake Velm."]}',
}
_LAYOUT = 'one object a line such as {"id": "a", "text": "The river Kelp ends in Lake Odran."}'
_FEWEST_TOKENS = 2
"""The first token of a payload has nothing before it and no likelihood."""


class Entry(NamedTuple):
    """One line. number, cluster: hashes of the names. payload: int32 ids as inserted. asked: prompt, target and choices, or nothing."""

    number: int
    id: str
    group: str
    cluster: int
    payload: np.ndarray
    asked: tuple[str, ...]


def read_entries(path: Path, metric: str, context: Context) -> Iterator[Entry]:
    """The lines of a file in order.

    Args:
        path: the file.
        metric: of the experiment; `completion` and `choice` ask for more fields.
        context: its tokenizer, vocabulary and sequence length.

    Raises:
        UserError: where a line is no such object, does not fit a slot, or contradicts an earlier one.
    """
    earlier = _Earlier()
    for line in read_json_lines(path, _LAYOUTS.get(metric, _LAYOUT)):
        entry = _entry(line, metric, context)
        earlier.add(line, entry)
        yield entry


@dataclass
class _Earlier:
    """What the lines so far hold, for what no line may repeat."""

    line_of_number: dict[int, int] = field(default_factory=dict)
    group_of: dict[int, tuple[str, int]] = field(default_factory=dict)
    cluster_of: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def add(self, line: Line, entry: Entry) -> None:
        first = self.line_of_number.setdefault(entry.number, line.number)
        if first != line.number:
            line.refuse(f"the id {entry.id!r} is that of line {first} already; ids must be unique")
        group, first = self.group_of.setdefault(entry.cluster, (entry.group, line.number))
        if group != entry.group:
            line.refuse(f"its cluster is in group {entry.group!r} here and in {group!r} in line {first}; a cluster lies in one group")
        cluster, first = self.cluster_of.setdefault(entry.payload.tobytes(), (entry.cluster, line.number))
        if cluster != entry.cluster:
            line.refuse(
                f"it inserts the same tokens as line {first}; one could be held out while the other is inserted. Remove one, or give both the same `cluster`"
            )


def _entry(line: Line, metric: str, context: Context) -> Entry:
    for name in line.record:
        if name not in FIELDS:
            close = get_close_matches(name, FIELDS, n=1)
            line.refuse(
                f"there is no field `{name}`" + (f" (did you mean `{close[0]}`?)" if close else f"; fields are {', '.join(FIELDS)}")
            )
    identity = _name(line, "id")
    number = key(0, "texts", "item", identity) >> 11
    cluster = key(0, "texts", "cluster", _name(line, "cluster")) >> 11 if "cluster" in line.record else number
    group = _name(line, "group") if "group" in line.record else ""
    asked = _asked(line, metric)
    payload = _payload(line, context)
    _check_fit(line, payload, asked, context)
    return Entry(number, identity, group, cluster, payload, asked)


def _name(line: Line, name: str) -> str:
    value = line.field(name, (str, int))
    if isinstance(value, bool) or value == "":
        line.refuse(f"`{name}` is {value!r}; it must be a text or a whole number")
    return str(value)


def _text(line: Line, name: str) -> str:
    """Text as it stands, white space and all."""
    value = line.field(name, str)
    if not value:
        line.refuse(f"`{name}` is empty")
    return str(value)


def _asked(line: Line, metric: str) -> tuple[str, ...]:
    """Prompt, target and choices, as far as the metric asks for them."""
    if metric not in _LAYOUTS:
        return ()
    prompt, target = _text(line, "prompt"), _text(line, "target")
    if metric == "completion":
        return prompt, target
    choices = line.field("choices", list)
    if not choices or not all(isinstance(choice, str) and choice for choice in choices) or target in choices:
        line.refuse("`choices` must be a list of texts that are wrong; the target is not among them")
    return prompt, target, *choices


def _payload(line: Line, context: Context) -> np.ndarray:
    """int32 token ids as inserted."""
    if ("text" in line.record) and ("token_ids" in line.record):
        line.refuse("it has both `text` and `token_ids`; only one can be inserted")
    if "token_ids" in line.record:
        return _token_ids(line, context)
    names = ["text"] if "text" in line.record or "prompt" not in line.record else ["prompt", "target"]
    eos = [context.tokenizer.eos_id]
    return np.concatenate([eos, *(context.tokenizer.encode(_text(line, name)) for name in names), eos]).astype(np.int32)


def _token_ids(line: Line, context: Context) -> np.ndarray:
    values = line.field("token_ids", list)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < context.vocabulary_size:
            line.refuse(f"`token_ids` holds {value!r:.40}, which is no id of the vocabulary of {context.vocabulary_size}")
    return np.array(values, np.int32)


def _check_fit(line: Line, payload: np.ndarray, asked: tuple[str, ...], context: Context) -> None:
    """What is inserted and what is asked must each fit into one slot."""
    length = context.geometry.sequence_length
    if len(payload) - int(len(payload) > 0 and payload[-1] == context.tokenizer.eos_id) < _FEWEST_TOKENS:
        line.refuse(f"it has {len(payload)} tokens to insert, too few to be scored")
    prompt, *endings = [len(context.tokenizer.encode(text)) for text in asked] or [0]
    needed = {"to insert, EOS included": len(payload), "to ask about, EOS included": 1 + prompt + max(endings, default=0)}
    for what, num in needed.items():
        if num > length:
            line.refuse(
                f"it has {num} tokens {what}, but a slot holds {length}; shorten it, split it under one `cluster`, or raise sequence_length"
            )
