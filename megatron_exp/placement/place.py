"""Placement: a pure function from requests, geometry and seed to a place for every copy.

Each copy has its own endless keyed sequence of candidate places and takes the first that is free. Experiments are placed in
the order of the file. A token copy finds free what no exclusive slot and no copy placed before it holds. An exclusive
slot displaces the copies it falls on, and they alone move, to the first of their candidates that is free by then. So
appending a token experiment moves nothing, and appending an exclusive one moves only the copies it hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import Copies, CopyTable
from megatron_exp.placement.whole import place_whole
from megatron_exp.seeding import key
from megatron_exp.stream.permutation import Permutation
from megatron_exp.stream.slot import Geometry


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the copies went: uint64 [rows] slots and int64 [rows] offsets (0 for whole slots), beside the rows of the requests."""

    table: CopyTable
    slots: np.ndarray
    offsets: np.ndarray

    def of(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and offsets of one request's copies."""
        rows = slice(int(self.table.bounds[request]), int(self.table.bounds[request + 1]))
        return self.slots[rows], self.offsets[rows]


@dataclass(frozen=True)
class SlotBudget:
    """Exactly `num_slots` slots, drawn by `seed`, may be touched at all."""

    num_slots: int
    seed: int


def place(requests: Sequence[Copies], geometry: Geometry, budget: SlotBudget | None = None) -> Placement:
    """A place for every copy of every request, in the order of `requests` (which is their rank; an experiment's lie together).

    Raises UserError where a copy finds no place, naming experiment, condition, room and remedy; nothing is dropped.
    """
    table = CopyTable.of(requests)
    table.check(geometry)
    state = search.State.of(len(table))
    closed = place_whole(table, state.slots, geometry)
    whole = table.length == 0
    allowed = _allowed_slots(state.slots[whole], geometry, budget) if budget else np.empty(0, np.uint64)
    tokens = _Tokens(table, geometry, allowed, state, search.table_of(np.empty(0, np.uint64), sum(map(len, closed))))
    for part, slots in zip(table.experiments, closed, strict=True):
        tokens.close(slots)
        tokens.add(part.start + np.flatnonzero(~whole[part]))
    return Placement(table, state.slots, state.offsets)


def _allowed_slots(taken: np.ndarray, geometry: Geometry, budget: SlotBudget) -> np.ndarray:
    """Sorted slots that token copies may use: the drawn ones that are not already whole-slot rewrites."""
    rest = budget.num_slots - len(taken)
    if rest < 0:
        raise UserError(
            f"budget.fraction allows {budget.num_slots} touched slots, but swaps and noise alone need {len(taken)}. "
            "Raise the fraction or ask for fewer."
        )
    order = Permutation(geometry.num_slots, key(budget.seed, "budget")).forward(np.arange(budget.num_slots, dtype=np.uint64))
    return np.sort(order[~np.isin(order, taken)][:rest])


class _Tokens:
    """Token copies, placed experiment by experiment into `state`."""

    def __init__(self, table: CopyTable, geometry: Geometry, allowed: np.ndarray, state: search.State, closed: np.ndarray):
        self._table, self._geometry, self._allowed, self._state, self._closed = table, geometry, allowed, state, closed
        self._first, self._end = table.first_slot, table.end_slot
        if len(allowed):
            self._first, self._end = (np.searchsorted(allowed, border).astype(np.uint64) for border in (table.first_slot, table.end_slot))
        self._placed: list[np.ndarray] = []

    def close(self, slots: np.ndarray) -> None:
        """Make slots exclusive and move the copies they hit, in rank order."""
        search.insert_all(self._closed, slots)
        for rows in self._placed if len(slots) else []:
            self._place(rows[np.isin(self._state.slots[rows], slots)])

    def add(self, rows: np.ndarray) -> None:
        """Place the token copies of one experiment."""
        self._place(rows)
        self._placed.append(rows)

    def _place(self, rows: np.ndarray) -> None:
        table = self._table
        failed = search.first_free_places(
            rows,
            table.key,
            table.item,
            table.repetition,
            table.length,
            self._first,
            self._end,
            table.fixed_slot,
            table.fixed_offset,
            self._allowed,
            self._closed,
            self._geometry.sequence_length,
            *self._state,
        )
        if failed >= 0:
            first, end = table.first_slot[failed], table.end_slot[failed]
            inside = (self._state.slots >= first) & (self._state.slots < end)
            detail = f"copies placed before hold {int(table.length[inside].sum())} tokens there"
            raise table.no_room(int(failed), self._geometry, detail)
