"""Whole-slot copies (swaps, noise): which slots they take, experiment by experiment. Token copies play no part in it."""

from typing import NamedTuple

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import CopyTable
from megatron_exp.stream.slot import Geometry


class Closed(NamedTuple):
    """Slots that close when an experiment is placed. exclusive: to all token copies. to_splices: those and the slots whose content is swapped."""

    exclusive: np.ndarray
    to_splices: np.ndarray


def place_whole(table: CopyTable, slots: np.ndarray, geometry: Geometry) -> list[Closed]:
    """Write the slots of all whole-slot copies (length 0) into `slots` [rows]; no two share one.

    Given places come as they are; copies that float take their first free candidate, and move on when a later given place hits them.
    Returns, by experiment, the slots that become closed to token copies when it is placed. A slot that an exclusive copy left again
    stays closed, so that its going moves no token copy. Raises UserError where two given places collide or a copy finds no slot.
    """
    all_whole = np.flatnonzero(table.whole)
    _refuse_shared_slots(table, all_whole[table.is_given(all_whole)], geometry)
    taken = search.table_of(np.empty(0, np.uint64), 2 * len(all_whole))
    closed = []
    before = np.empty(0, np.int64)
    for part in table.experiments:
        rows = all_whole[np.searchsorted(all_whole, part.start) : np.searchsorted(all_whole, part.stop)]
        is_given = table.is_given(rows)
        given = rows[is_given]
        slots[given] = table.given_place(given)[0]
        search.insert_all(taken, slots[given])
        hit = before[np.isin(slots[before], slots[given]) & ~table.is_given(before)]
        _float(table, np.concatenate([hit, rows[~is_given]]), taken, slots, geometry)
        changed = np.concatenate([rows, hit])
        closed.append(Closed(slots[changed[table.of_request("exclusive", changed)]], slots[changed]))
        before = np.concatenate([before, rows])
    return closed


def _float(table: CopyTable, rows: np.ndarray, taken: np.ndarray, slots: np.ndarray, geometry: Geometry) -> None:
    found = np.empty(len(rows), np.uint64)
    first, end = table.windows(rows)
    failed = search.first_free_slots(
        table.of_request("key", rows), table.of_request("item", rows), table.repetition(rows), first, end, taken, found
    )
    if failed >= 0:
        raise table.no_room(int(rows[failed]), geometry, "every slot tried is already swapped or perturbed")
    slots[rows] = found


def _refuse_shared_slots(table: CopyTable, rows: np.ndarray, geometry: Geometry) -> None:
    slots = table.given_place(rows)[0]
    order = np.argsort(slots, kind="stable")
    for position in np.flatnonzero(np.diff(slots[order]) == 0)[:1]:
        first, second = (table.names[table.of_request("experiment", rows[order[position + k : position + k + 1]])[0]] for k in (0, 1))
        slot = int(slots[order[position]])
        raise UserError(
            f"Experiments {first} and {second} both replace or perturb the whole of slot {slot} "
            f"(step {geometry.step(slot)}). Give one of them other steps."
        )
