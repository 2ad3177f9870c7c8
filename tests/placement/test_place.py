import numpy as np
import pytest

from megatron_exp import seeding
from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.place import SlotBudget, place
from megatron_exp.placement.rows import Copies, candidate_key
from megatron_exp.stream.slot import Geometry

GEOMETRY = Geometry(sequence_length=16, global_batch_size=4, steps=32)


def copies(
    name: str, item: int, num: int, length: int, start: int = 0, end: int = 32, *, even: bool = False, exclusive: bool = False
) -> Copies:
    batch = GEOMETRY.global_batch_size
    key = candidate_key(0, name, "main", "tokens" if length else "swap")
    return Copies(name, "all", key, item, length, exclusive, num, start * batch, end * batch, even)


def fixed(name: str, places: list[tuple[int, int]], length: int, *, exclusive: bool = False) -> Copies:
    slots, offsets = np.array(places, dtype=np.uint64).T
    return copies(name, 0, len(places), length, exclusive=exclusive)._replace(fixed=(slots, offsets))


def spots(requests, **options):
    placement = place(requests, GEOMETRY, **options)
    return [list(zip(*(column.tolist() for column in placement.of(i)), strict=True)) for i in range(len(requests))]


def test_every_copy_gets_a_place_inside_its_slot_and_no_two_overlap():
    requests = [copies("a", item, 4, 5) for item in range(20)] + [copies("b", item, 6, 16) for item in range(3)]
    taken = np.zeros((GEOMETRY.num_slots, 16), dtype=int)
    for request, placed in zip(requests, spots(requests), strict=True):
        assert len(placed) == request.num
        for slot, offset in placed:
            assert offset + request.length <= 16
            taken[slot, offset : offset + request.length] += 1
    assert taken.max() == 1
    assert taken.sum() == 20 * 4 * 5 + 3 * 6 * 16


def test_placement_is_reproducible_and_follows_the_key():
    requests = [copies("a", item, 10, 5) for item in range(5)]
    assert spots(requests) == spots(requests)
    assert spots(requests) != spots([copies("other", item, 10, 5) for item in range(5)])


def test_appending_a_token_experiment_moves_nothing():
    first = [copies("a", item, 10, 5) for item in range(20)]
    assert spots(first + [copies("b", item, 4, 4) for item in range(4)])[:20] == spots(first)


def test_appending_an_exclusive_experiment_moves_only_the_copies_it_hits():
    first = [copies("a", item, 10, 5) for item in range(12)]
    whole = fixed("b", [(slot, 0) for slot in range(8, 12)], 0, exclusive=True)
    before, after = spots(first), spots([*first, whole])[:12]
    hit = {(i, r) for i, request in enumerate(before) for r, (slot, _) in enumerate(request) if 8 <= slot < 12}
    changed = {(i, r) for i in range(12) for r in range(10) if before[i][r] != after[i][r]}
    assert hit and changed == hit
    assert all(not 8 <= slot < 12 for request in after for slot, _ in request)


def test_a_token_experiment_after_an_exclusive_one_moves_nothing_either():
    first = [*(copies("a", item, 10, 5) for item in range(12)), fixed("b", [(slot, 0) for slot in range(8, 12)], 0, exclusive=True)]
    assert spots([*first, *(copies("c", item, 6, 4) for item in range(6))])[:13] == spots(first)


def test_a_given_exclusive_place_moves_the_floating_ones_it_hits_and_no_others():
    floating_ones = [copies("gw", item, 1, 0, exclusive=True) for item in range(60)]
    before = spots(floating_ones)
    whole = fixed("fc", [(slot, 0) for slot in range(40, 60)], 0, exclusive=True)
    after = spots([*floating_ones, whole])[:60]
    assert [new != old for new, old in zip(after, before, strict=True)] == [40 <= old[0][0] < 60 for old in before]
    assert len({slot for request in after for slot, _ in request}) == 60


def test_windows_and_strata_hold():
    window, strata = spots([copies("a", 1, 50, 4, 8, 16), copies("b", 2, 8, 4, 0, 32, even=True)])
    assert all(8 <= GEOMETRY.step(slot) < 16 for slot, _ in window)
    assert [GEOMETRY.step(slot) // 4 for slot, _ in strata] == list(range(8))


def test_swaps_that_are_not_exclusive_let_tokens_in():
    swap = fixed("removal", [(slot, 0) for slot in range(GEOMETRY.num_slots)], 0)
    assert len(spots([swap, copies("a", 1, 5, 4)])[1]) == 5


def test_floating_whole_slots_are_distinct_and_respect_fixed_ones():
    placed = spots([fixed("fc", [(0, 0), (1, 0)], 0, exclusive=True), copies("gw", 1, 100, 0, exclusive=True)])
    slots = [slot for request in placed for slot, _ in request]
    assert len(set(slots)) == 102


def test_a_slot_budget_confines_all_copies_to_exactly_the_drawn_slots():
    requests = [copies("a", item, 8, 3) for item in range(10)] + [fixed("fc", [(5, 0)], 0, exclusive=True)]
    touched = {slot for request in spots(requests, budget=SlotBudget(20, seed=0)) for slot, _ in request}
    assert len(touched) <= 20 and 5 in touched
    again = {slot for request in spots(requests[:5] + requests[10:], budget=SlotBudget(20, seed=0)) for slot, _ in request}
    assert len(touched | again) <= 20


def test_whole_slots_that_come_late_move_no_token_and_stay_inside_the_budget():
    early = [copies("a", item, 8, 3) for item in range(10)] + [copies("gw", 1, 4, 0, exclusive=True)]
    used = {slot for request in spots(early, budget=SlotBudget(30, seed=0, held_back=6)) for slot, _ in request}
    late = [fixed("removal", [(slot, 0) for slot in range(GEOMETRY.num_slots) if slot not in used][:6], 0)]
    budget = SlotBudget(30, seed=0, held_back=6, late=len(early))
    placed = spots(early + late, budget=budget)
    assert placed[: len(early)] == spots(early, budget=SlotBudget(30, seed=0, held_back=6))
    assert len({slot for request in placed for slot, _ in request}) <= 30
    with pytest.raises(UserError, match="held_back keeps 5 slots .* but they need 6"):
        spots(early + late, budget=SlotBudget(30, seed=0, held_back=5, late=len(early)))


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([copies("a", 1, 1, 17)], "17 tokens but a slot holds 16"),
        ([copies("a", 1, 5, 16, 0, 1)], "finds no free place in steps 0 to 1"),
        ([copies("a", 1, 4, 0, 0, 1, exclusive=True), copies("b", 1, 1, 0, 0, 1, exclusive=True)], "finds no free place"),
        ([fixed("a", [(3, 0)], 0), fixed("b", [(3, 0)], 0)], "a and b both replace"),
        ([fixed("a", [(3, 2)], 5), fixed("b", [(3, 6)], 5)], "must be at slot 3, offset 6"),
        ([fixed("a", [(200, 0)], 4)], "the run has 32"),
        ([copies("a", 1, 200, 1, 0, 1, even=True)], "holds no slot"),
    ],
)
def test_what_does_not_fit_is_an_error_with_a_remedy(requests, words):
    with pytest.raises(UserError, match=words):
        place(requests, GEOMETRY)


def test_the_compiled_words_equal_the_reference():
    for item, repetition, draw in [(0, 0, 0), (3, 7, 9), (2**40 + 5, 65_000, 16_000)]:
        reference = seeding.philox(seeding.key(1, "x"), draw, repetition, item, item >> 32).astype(np.uint64)
        words = search.philox_words(np.uint64(seeding.key(1, "x")), np.uint64(item), np.uint64(repetition), np.uint64(draw))
        assert [int(word) for word in words] == [int(reference[i]) | int(reference[i + 1]) << 32 for i in (0, 2)]


def test_places_are_uniform_over_slots_and_offsets():
    slots, offsets = zip(*spots([copies("a", 1, 512, 1)])[0], strict=True)
    assert abs(np.mean(slots) - 63.5) < 5 * 37 / np.sqrt(512)
    assert abs(np.mean(offsets) - 7.5) < 5 * 4.7 / np.sqrt(512)


def test_zero_requests_are_fine():
    assert len(place([], GEOMETRY).slots) == 0
