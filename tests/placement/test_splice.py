"""Splices: at a document boundary that leaves room, alone in their slots, and stable under additions."""

from functools import cache

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.placement.place import SlotBudget, place
from megatron_exp.seeding import Words
from tests.placement.test_place import GEOMETRY, copies, fixed


@cache
def boundaries(slot):
    """About half of the slots have none."""
    drawn = Words.of(0, "boundaries", slot).integers(4, 16)
    return np.unique(drawn) if slot % 2 else np.empty(0, np.int64)


def splices(name, item, num, length, **options):
    return copies(name, item, num, length, **options)._replace(splice=True)


def spots(requests, **options):
    placement = place(requests, GEOMETRY, boundaries=boundaries, **options)
    return [list(zip(*(column.tolist() for column in placement.of(i)), strict=True)) for i in range(len(requests))]


def test_a_splice_lies_at_a_boundary_that_leaves_room_and_has_its_slot_to_itself():
    requests = [splices("a", item, 3, 4) for item in range(8)] + [copies("a", item, 5, 3) for item in range(8, 20)]
    found = spots(requests)
    spliced = [place for one in found[:8] for place in one]
    assert all(offset in boundaries(slot) and offset + 4 <= 16 for slot, offset in spliced)
    slots = {slot for slot, _ in spliced}
    assert len(slots) == 24
    assert not slots & {slot for one in found[8:] for slot, _ in one}


def test_the_boundary_is_a_uniform_choice():
    many = [splices("a", item, 1, 1) for item in range(40)]
    chosen, possible = [], []
    for seed in range(20):
        for request in spots([one._replace(key=one.key + seed) for one in many]):
            ((slot, offset),) = request
            chosen.append(list(boundaries(slot)).index(offset))
            possible.append(len(boundaries(slot)))
    places = (np.array(chosen) + 0.5) / np.array(possible)
    assert abs(places.mean() - 0.5) < 5 * 0.29 / np.sqrt(len(places))


def test_appending_token_copies_and_splices_moves_nothing():
    first = [splices("a", 0, 10, 5), copies("a", 1, 10, 5)]
    assert spots([*first, splices("b", 0, 8, 5), copies("b", 1, 8, 5)])[:2] == spots(first)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_swap_of_the_slot_moves_a_splice_and_only_those_it_hits(exclusive):
    first = [splices("a", item, 2, 5) for item in range(12)] + [copies("a", item, 2, 5) for item in range(12, 24)]
    whole = fixed("b", [(slot, 0) for slot in range(30, 60)], 0, exclusive=exclusive)
    before, after = spots(first), spots([*first, whole, copies("c", 0, 60, 2)])[:24]
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        hit = [30 <= slot < 60 and (exclusive or number < 12) for slot, _ in old]
        assert hit == [one != other for one, other in zip(old, new, strict=True)]
    assert any(30 <= slot < 60 for one in before[:12] for slot, _ in one)
    assert not any(30 <= slot < 60 for one in after[:12] for slot, _ in one)


def test_a_slot_that_a_splice_left_takes_token_copies_again():
    swap = fixed("b", [(slot, 0) for slot in range(64)], 0)
    full = [copies("c", item, 1, 16, end=16) for item in range(64)]
    assert len({slot for one in spots([splices("a", 0, 4, 5), swap, *full])[2:] for slot, _ in one}) == 64


def test_a_slot_budget_confines_splices_too():
    touched = {slot for one in spots([splices("a", 0, 9, 3), copies("a", 1, 9, 3)], budget=SlotBudget(40, seed=0)) for slot, _ in one}
    again = {slot for one in spots([splices("a", 0, 3, 3)], budget=SlotBudget(40, seed=0)) for slot, _ in one}
    assert again <= touched and len(touched) <= 40


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([fixed("a", [(2, 0)], 4)._replace(splice=True)], "no document boundary there"),
        ([splices("a", 0, 3, 4, end=1)], "finds no free slot with a document boundary"),
        ([copies("a", 0, 4, 16, end=1), splices("b", 0, 1, 2, end=1)], "finds no free slot with a document boundary"),
    ],
)
def test_a_splice_without_a_place_is_an_error(requests, words):
    with pytest.raises(UserError, match=words):
        spots(requests)


def test_a_given_place_is_taken_where_a_document_begins():
    offset = int(boundaries(3)[0])
    assert spots([fixed("a", [(3, offset)], 2)._replace(splice=True)]) == [[(3, offset)]]
