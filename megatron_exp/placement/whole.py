"""Whole-slot copies (swaps, noise): which slots they take, experiment by experiment. Token copies play no part in it."""

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import FLOATING, CopyTable
from megatron_exp.stream.slot import Geometry


def place_whole(table: CopyTable, slots: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    """Write the slots of all whole-slot copies (length 0) into `slots` [rows]; no two share one.

    Given places come as they are; copies that float take their first free candidate, and move on when a later given place hits them.
    Returns, by experiment, the slots that become closed to token copies when it is placed. A slot that an exclusive copy left again
    stays closed, so that its going moves no token copy. Raises UserError where two given places collide or a copy finds no slot.
    """
    whole = table.length == 0
    exclusive = np.fromiter((one.exclusive for one in table.requests), np.bool_, len(table.requests))
    _refuse_shared_slots(table, np.flatnonzero(whole & (table.fixed_slot != FLOATING)), geometry)
    taken = search.table_of(np.empty(0, np.uint64), 2 * int(whole.sum()))
    closed = []
    before = np.empty(0, np.int64)
    for part in table.experiments:
        rows = part.start + np.flatnonzero(whole[part])
        is_fixed = table.fixed_slot[rows] != FLOATING
        fixed = rows[is_fixed]
        slots[fixed] = table.fixed_slot[fixed]
        search.insert_all(taken, slots[fixed])
        hit = before[np.isin(slots[before], slots[fixed]) & (table.fixed_slot[before] == FLOATING)]
        _float(table, np.concatenate([hit, rows[~is_fixed]]), taken, slots, geometry)
        changed = np.concatenate([rows, hit])
        closed.append(slots[changed[exclusive[table.request[changed]]]])
        before = np.concatenate([before, rows])
    return closed


def _float(table: CopyTable, rows: np.ndarray, taken: np.ndarray, slots: np.ndarray, geometry: Geometry) -> None:
    found = np.empty(len(rows), np.uint64)
    failed = search.first_free_slots(
        table.key[rows], table.item[rows], table.repetition[rows], table.first_slot[rows], table.end_slot[rows], taken, found
    )
    if failed >= 0:
        raise table.no_room(int(rows[failed]), geometry, "every slot tried is already swapped or perturbed")
    slots[rows] = found


def _refuse_shared_slots(table: CopyTable, rows: np.ndarray, geometry: Geometry) -> None:
    order = rows[np.argsort(table.fixed_slot[rows], kind="stable")]
    for position in np.flatnonzero(np.diff(table.fixed_slot[order]) == 0)[:1]:
        first, second = (table.requests[int(table.request[order[position + k]])] for k in (0, 1))
        slot = int(table.fixed_slot[order[position]])
        raise UserError(
            f"Experiments {first.experiment} and {second.experiment} both replace or perturb the whole of slot {slot} "
            f"(step {geometry.step(slot)}). Give one of them other steps."
        )
