"""Placement: a pure function from requests, geometry and seed to a place for every copy.

Each copy has its own endless keyed sequence of candidate places and takes the first that is free. Experiments are placed in
the order of the file. A token copy finds free what no exclusive slot and no copy placed before it holds. An exclusive
slot displaces the copies it falls on, and they alone move, to the first of their candidates that is free by then. So
appending a token experiment moves nothing, and appending an exclusive one moves only the copies it hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import FLOATING, Copies, CopyTable, check_copies, no_room
from megatron_exp.placement.whole import WholeSlots, place_whole
from megatron_exp.seeding import key
from megatron_exp.stream.permutation import Permutation
from megatron_exp.stream.slot import Geometry


@dataclass(frozen=True, eq=False)
class Placed:
    """Where one request's copies went: uint64 [copies] slots and int64 [copies] offsets (0 for whole slots)."""

    slots: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class SlotBudget:
    """Exactly `num_slots` slots, drawn by `seed`, may be touched at all."""

    num_slots: int
    seed: int


def place(requests: Sequence[Copies], geometry: Geometry, budget: SlotBudget | None = None) -> list[Placed]:
    """A place for every copy of every request, in the order of `requests` (which is their rank; an experiment's lie together).

    Raises UserError where a copy finds no place, naming experiment, condition, room and remedy; nothing is dropped.
    """
    for request in requests:
        check_copies(request, geometry)
    experiments = [list(group) for _, group in groupby(range(len(requests)), key=lambda i: requests[i].name)]
    whole = place_whole(requests, experiments, geometry)
    allowed = _allowed_slots(whole, geometry, budget) if budget else np.empty(0, np.uint64)
    tokens = _Tokens(requests, geometry, allowed, whole.num_blocked)
    for members, blocked in zip(experiments, whole.blocked, strict=True):
        tokens.block(blocked)
        tokens.add(members)
    places = tokens.places()
    return [
        Placed(whole.slots[i], np.zeros(len(whole.slots[i]), np.int64)) if requests[i].length == 0 else Placed(*places[i])
        for i in range(len(requests))
    ]


def _allowed_slots(whole: WholeSlots, geometry: Geometry, budget: SlotBudget) -> np.ndarray:
    """Sorted slots that token copies may use: the drawn ones that are not already whole-slot rewrites."""
    taken = np.concatenate([np.empty(0, np.uint64), *whole.slots.values()])
    rest = budget.num_slots - len(taken)
    if rest < 0:
        raise UserError(
            f"budget.fraction allows {budget.num_slots} touched slots, but swaps and noise alone need {len(taken)}. "
            "Raise the fraction or ask for fewer."
        )
    order = Permutation(geometry.num_slots, key(budget.seed, "budget")).forward(np.arange(budget.num_slots, dtype=np.uint64))
    return np.sort(order[~np.isin(order, taken)][:rest])


class _Tokens:
    """Token copies of all requests, placed experiment by experiment."""

    def __init__(self, requests: Sequence[Copies], geometry: Geometry, allowed: np.ndarray, num_blocked: int):
        self._requests, self._geometry, self._allowed = requests, geometry, allowed
        self._chosen = [i for i, request in enumerate(requests) if request.length > 0]
        self._table = table = CopyTable.of(requests, self._chosen)
        self._first, self._end = table.first_slot, table.end_slot
        if len(allowed):
            self._first, self._end = (np.searchsorted(allowed, border).astype(np.uint64) for border in (table.first_slot, table.end_slot))
        self._state = search.State.of(len(table.key))
        self._blocked = search.table_of(np.empty(0, np.uint64), num_blocked)
        self._num_placed = 0

    def block(self, slots: np.ndarray) -> None:
        """Make slots exclusive and move the copies they hit, in rank order."""
        search.insert_all(self._blocked, slots)
        hit = np.flatnonzero(np.isin(self._state.slots[: self._num_placed], slots)) if len(slots) else np.empty(0, np.int64)
        self._place(hit)

    def add(self, members: Sequence[int]) -> None:
        """Place the copies of one experiment's requests."""
        num = sum(self._requests[i].num for i in members if self._requests[i].length > 0)
        rows = np.arange(self._num_placed, self._num_placed + num)
        self._place(rows)
        self._num_placed += num

    def places(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Slots and offsets by request."""
        slots, offsets = (self._table.by_request(values, self._chosen) for values in (self._state.slots, self._state.offsets))
        return {i: (slots[i], offsets[i]) for i in self._chosen}

    def _place(self, rows: np.ndarray) -> None:
        table, state = self._table, self._state
        failed = search.first_free_places(
            rows,
            table.key,
            table.item,
            table.repetition.astype(np.uint64),
            table.length,
            self._first,
            self._end,
            table.fixed_slot,
            table.fixed_offset,
            self._allowed,
            self._blocked,
            self._geometry.sequence_length,
            *state,
        )
        if failed >= 0:
            raise self._no_room(failed)

    def _no_room(self, row: int) -> UserError:
        table = self._table
        copies, repetition = self._requests[int(table.request[row])], int(table.repetition[row])
        if table.fixed_slot[row] != FLOATING:
            return UserError(
                f"Experiment {copies.name}, condition {copies.condition}: copy {repetition} of item {copies.item} must be at slot "
                f"{int(table.fixed_slot[row])}, offset {int(table.fixed_offset[row])}, which is exclusive or holds another copy. "
                "Choose another place, or list this experiment before the one that holds it."
            )
        first, end = table.first_slot[row], table.end_slot[row]
        before = self._state.slots[: max(self._num_placed, row)]
        taken = int(table.length[: len(before)][(before >= first) & (before < end)].sum())
        return no_room(copies, repetition, self._geometry, f"copies placed before hold {taken} tokens there")
