"""No experiment may spoil another: no payload and no swapped-in slot holds what another experiment forbids (`Experiment.forbidden`)."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments.protocol import Experiment, Forbidden, Item
from megatron_exp.experiments.tables import Wanted
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.places import in_texts
from megatron_exp.stream.base import Stream
from megatron_exp.stream.slot import slot_name

_HEAD_TOKENS = 64
"""Searched for; what matches is then compared in full. Held-out documents are long and many."""


class Planned(NamedTuple):
    """One enabled experiment with its items."""

    name: str
    experiment: Experiment
    items: Sequence[Item]


class _Declared(NamedTuple):
    experiment: str
    string: Forbidden


def require_apart(planned: Sequence[Planned]) -> None:
    """UserError naming both experiments and the item, where a payload that is inserted holds a string that another experiment forbids."""
    declared = _declared(planned)
    owners = [(one.name, item) for one in planned for item in one.items if item.role == "treated" and item.payload is not None]
    texts = [item.payload for _, item in owners if item.payload is not None]
    for declaration, number in _matches(declared, texts.__getitem__, [name for name, _ in owners]):
        name, item = owners[number]
        raise UserError(
            f"Experiment {name}, condition {item.condition}, item {item.item}: what it inserts holds {declaration.string.what} of experiment "
            f"{declaration.experiment}, whose controls would no longer be untouched. Take that text out of the data of one of them, or draw others with "
            "another seeds.placement."
        )


def require_clean_sources(planned: Sequence[Planned], wanted: Sequence[Wanted], stream: Stream) -> None:
    """The same for slots that are swapped in, and strings that may not come in with them either."""
    declared = [one for one in _declared(planned) if one.string.in_sources]
    names = {one.name for one in planned}
    swaps = [one for one in wanted if one.request.kind == "swap" and any(one.experiment != other.experiment for other in declared)]
    owners = [(one, int(slot)) for one in swaps if one.experiment in names for slot in _sources(one)]
    reach = stream.geometry.sequence_length + stream.look_ahead

    def shown(number: int) -> np.ndarray:
        return stream.read(owners[number][1]).tokens[:reach]

    for declaration, number in _matches(declared, shown, [one.experiment for one, _ in owners]):
        one, slot = owners[number]
        raise UserError(
            f"Experiment {one.experiment}, condition {one.item.condition}, item {one.item.item}: slot {slot_name(slot)}, which it swaps in, holds "
            f"{declaration.string.what} of experiment {declaration.experiment}. List it before that experiment, or draw other slots with another "
            "seeds.placement."
        )


def _sources(one: Wanted) -> np.ndarray:
    assert one.request.source_slots is not None, "a swap has source slots"
    return one.request.source_slots


def _declared(planned: Sequence[Planned]) -> list[_Declared]:
    return [_Declared(one.name, string) for one in planned for string in one.experiment.forbidden(one.items)]


def _matches(declared: Sequence[_Declared], text_of: Callable[[int], np.ndarray], names: Sequence[str]) -> Iterator[tuple[_Declared, int]]:
    """(declaration, number of the text) wherever a text (`names`: whose each is) of another experiment holds a string as a whole."""
    if not declared or not names:
        return
    patterns = Patterns.of([one.string.tokens[:_HEAD_TOKENS] for one in declared])
    for string, text in in_texts(map(text_of, range(len(names))), patterns, threads=len(os.sched_getaffinity(0))):
        one = declared[string]
        if one.experiment != names[text] and _holds(text_of(text), one.string.tokens):
            yield one, text


def _holds(text: np.ndarray, string: np.ndarray) -> bool:
    if len(string) > len(text):
        return False
    return bool((np.lib.stride_tricks.sliding_window_view(text, len(string)) == string).all(axis=1).any())
