"""Placement: a pure function from requests, geometry and seed to a place for every copy.

Each copy has its own endless keyed sequence of candidate places and takes the first that is free. Experiments are placed in
the order of the file. A token copy finds free what no exclusive slot and no copy placed before it holds. An exclusive
slot displaces the copies it falls on, and they alone move, to the first of their candidates that is free by then. So
appending a token experiment moves nothing, and appending an exclusive one moves only the copies it hits. A splice has its slot
to itself, at one of the document boundaries there; within an experiment splices come first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import Copies, CopyTable
from megatron_exp.placement.whole import Closed, place_whole
from megatron_exp.seeding import key
from megatron_exp.stream.permutation import Permutation
from megatron_exp.stream.slot import Geometry

_SPLICES_AT_ONCE, _DRAWS_AT_ONCE = 1024, 2
_NOWHERE = np.uint64(0xFFFFFFFFFFFFFFFF)


class Boundaries(Protocol):
    """Where documents begin in the base content of slots (`placement.boundaries.DocumentBoundaries`)."""

    def __call__(self, slot: int) -> np.ndarray:
        """int64, rising: the offsets in [0, S) of a training slot at which a document begins."""
        ...


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the copies went: uint64 [rows] slots and int32 [rows] offsets (0 for whole slots), beside the rows of the requests."""

    table: CopyTable
    slots: np.ndarray
    offsets: np.ndarray

    def of(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and offsets of one request's copies."""
        rows = slice(int(self.table.bounds[request]), int(self.table.bounds[request + 1]))
        return self.slots[rows], self.offsets[rows]


@dataclass(frozen=True)
class SlotBudget:
    """Exactly `num_slots` slots, drawn by `seed`, may be touched at all.

    held_back: how many of them only whole-slot copies of late requests may use, those from position `late` on. Late requests are not known yet when
    the others are placed, so what the others may use must not depend on them.
    """

    num_slots: int
    seed: int
    held_back: int = 0
    late: int | None = None


def place(
    requests: Iterable[Copies], geometry: Geometry, budget: SlotBudget | None = None, boundaries: Boundaries | None = None
) -> Placement:
    """A place for every copy of every request, in the order of `requests` (which is their rank; an experiment's lie together).

    boundaries: asked for the candidate slots of splices only. Raises UserError where a copy finds no place, naming experiment, condition,
    room and remedy; nothing is dropped.
    """
    table = CopyTable.of(requests)
    table.check(geometry)
    slots = np.full(len(table), _NOWHERE)
    closed = place_whole(table, slots, geometry)
    whole = table.whole
    allowed = _allowed_slots(table, slots, geometry, budget) if budget else np.empty(0, np.uint64)
    tokens = _Tokens(table, geometry, allowed, closed, slots, boundaries)
    for part, ending in zip(table.experiments, closed, strict=True):
        tokens.close(ending)
        rows = np.flatnonzero(~whole[part])
        rows += part.start
        splice = table.of_all("splice")[rows] if table.requests["splice"].any() else np.zeros(0, bool)
        tokens.add_splices(rows[splice] if splice.any() else rows[:0])
        tokens.add(rows[~splice] if splice.any() else rows)
    return Placement(table, slots, tokens.offsets)


def _allowed_slots(table: CopyTable, slots: np.ndarray, geometry: Geometry, budget: SlotBudget) -> np.ndarray:
    """Sorted slots that token copies may use: the drawn ones that are not already whole-slot rewrites."""
    num_early = len(slots) if budget.late is None else int(table.bounds[budget.late])
    rows = np.flatnonzero(table.whole)
    taken, taken_late = slots[rows[rows < num_early]], slots[rows[rows >= num_early]]
    rest = budget.num_slots - budget.held_back - len(taken)
    if rest < 0:
        raise UserError(
            f"budget.fraction allows {budget.num_slots} touched slots{f', {budget.held_back} of them held back' if budget.held_back else ''}, but swaps and "
            f"noise alone need {len(taken)}. Raise the fraction or ask for fewer."
        )
    if len(taken_late) > budget.held_back:
        raise UserError(
            f"budget.held_back keeps {budget.held_back} slots for whole slots of experiments that need a reference, but they need {len(taken_late)}. "
            "With unit slots the other experiments must leave them room before it is known: set budget.held_back to "
            f"{len(taken_late) / geometry.num_slots:.2g} or more of all slots and plan again from the beginning, or ask for fewer."
        )
    order = Permutation(geometry.num_slots, key(budget.seed, "budget")).forward(np.arange(budget.num_slots, dtype=np.uint64))
    allowed = order[~np.isin(order, taken)][:rest]
    return np.sort(allowed[~np.isin(allowed, taken_late)])


class _Tokens:
    """Token copies and splices, placed experiment by experiment into `slots` and `offsets`."""

    def __init__(
        self,
        table: CopyTable,
        geometry: Geometry,
        allowed: np.ndarray,
        closed: list[Closed],
        slots: np.ndarray,
        boundaries: Boundaries | None,
    ):
        num_closed = sum(len(ending.to_splices) for ending in closed)
        self._table, self._geometry, self._allowed, self._boundaries = table, geometry, allowed, boundaries
        self._state = search.State.of(slots, num_closed)
        self._closed, self._closed_to_splices = (search.table_of(np.empty(0, np.uint64), num_closed) for _ in range(2))
        self._placed: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def offsets(self) -> np.ndarray:
        return self._state.offsets

    def close(self, ending: Closed) -> None:
        """Close slots and move the copies they hit, in rank order."""
        search.insert_all(self._closed, ending.exclusive)
        search.insert_all(self._closed_to_splices, ending.to_splices)
        for splices, rows in self._placed if len(ending.to_splices) else []:
            self._place_splices(splices[np.isin(self._state.slots[splices], ending.to_splices)])
            self._place(rows[np.isin(self._state.slots[rows], ending.exclusive)])

    def add_splices(self, rows: np.ndarray) -> None:
        """Place the splices of one experiment; its token copies follow with `add`."""
        self._place_splices(rows)
        self._placed.append((rows, np.empty(0, np.int64)))

    def add(self, rows: np.ndarray) -> None:
        """Place the token copies of one experiment."""
        self._place(rows)
        self._placed[-1] = (self._placed[-1][0], rows)

    def _place(self, rows: np.ndarray) -> None:
        table = self._table
        failed = search.first_free_places(
            rows,
            table.request,
            table.bounds,
            table.requests,
            table.given_slots,
            table.given_offsets,
            self._allowed,
            self._closed,
            self._geometry.sequence_length,
            *self._state,
        )
        if failed >= 0:
            raise self._no_room(failed)

    def _place_splices(self, rows: np.ndarray) -> None:
        """In groups, so that the boundaries of many candidates are looked up before the first of the group is placed.

        A row whose first candidates are all taken goes on with its next ones before the row after it is placed: groups do not show.
        """
        for start in range(0, len(rows), _SPLICES_AT_ONCE):
            group, draw = rows[start : start + _SPLICES_AT_ONCE], 0
            while len(group):
                placed = self._try_splices(group[:1] if draw else group, draw)
                draw = 0 if placed else draw + _DRAWS_AT_ONCE
                group = group[placed:]
                if draw >= search.MAX_DRAWS or (draw and self._table.is_given(group[:1])[0]):
                    raise self._no_room(int(group[0]))

    def _try_splices(self, rows: np.ndarray, first_draw: int) -> int:
        """Place as many of `rows` as find a place among their next draws, up to the first that does not; how many."""
        table = self._table
        tried = np.empty((len(rows), _DRAWS_AT_ONCE), np.uint64)
        search.candidates(rows, table.request, table.bounds, table.requests, table.given_slots, self._allowed, first_draw, tried)
        assert self._boundaries is not None, "splices need the boundaries of documents"
        nothing = np.empty(0, np.int64)
        found = [self._boundaries(slot) if slot != int(_NOWHERE) else nothing for slot in tried.ravel().tolist()]
        starts = np.concatenate([[0], np.cumsum([len(offsets) for offsets in found])])
        return search.first_free_boundaries(
            rows,
            table.request,
            table.bounds,
            table.requests,
            table.given_offsets,
            tried,
            first_draw,
            starts,
            np.concatenate([nothing, *found]),
            self._closed_to_splices,
            self._geometry.sequence_length,
            *self._state,
        )

    def _no_room(self, row: int) -> UserError:
        table = self._table
        first, end = (int(column[0]) for column in table.windows(np.array([row])))
        inside = (self._state.slots >= first) & (self._state.slots < end)
        held = int(table.of_request("length", np.flatnonzero(inside)).sum())
        return table.no_room(row, self._geometry, f"copies placed before hold {held} tokens there")
