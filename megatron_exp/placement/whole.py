"""Whole-slot copies (swaps, noise): which slots they take, experiment by experiment. Token copies play no part in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import FLOATING, Copies, CopyTable, no_room
from megatron_exp.stream.slot import Geometry


@dataclass(frozen=True, eq=False)
class WholeSlots:
    """slots: by request, uint64 [copies]. blocked: by experiment, the slots that become closed to token copies when it is placed.

    A slot that an exclusive copy left again stays closed, so that its going moves no token copy.
    """

    slots: dict[int, np.ndarray]
    blocked: list[np.ndarray]

    @property
    def num_blocked(self) -> int:
        return sum(len(slots) for slots in self.blocked)


def place_whole(requests: Sequence[Copies], experiments: Sequence[Sequence[int]], geometry: Geometry) -> WholeSlots:
    """Slots for all whole-slot requests; no two copies share one.

    Given places come as they are; copies that float take their first free candidate, and move on when a later given place hits them.
    Raises UserError where two given places collide or a copy finds no slot.
    """
    chosen = [i for i, request in enumerate(requests) if request.length == 0]
    table = CopyTable.of(requests, chosen)
    exclusive = np.array([request.exclusive for request in requests], dtype=bool)
    _refuse_shared_slots(requests, table, geometry)
    slots = table.fixed_slot.copy()
    taken = search.table_of(np.empty(0, np.uint64), 2 * len(slots))
    blocked, start = [], 0
    for members in experiments:
        end = start + sum(requests[i].num for i in members if requests[i].length == 0)
        rows = np.arange(start, end)
        fixed = rows[table.fixed_slot[rows] != FLOATING]
        search.insert_all(taken, slots[fixed])
        hit = np.flatnonzero(np.isin(slots[:start], slots[fixed]) & (table.fixed_slot[:start] == FLOATING))
        floating = np.concatenate([hit, rows[table.fixed_slot[rows] == FLOATING]])
        _float(requests, table, floating, taken, slots, geometry)
        changed = np.concatenate([rows, hit])
        blocked.append(slots[changed[exclusive[table.request[changed]]]])
        start = end
    return WholeSlots(table.by_request(slots, chosen), blocked)


def _float(
    requests: Sequence[Copies], table: CopyTable, rows: np.ndarray, taken: np.ndarray, slots: np.ndarray, geometry: Geometry
) -> None:
    found = np.empty(len(rows), np.uint64)
    failed = search.first_free_slots(
        table.key[rows],
        table.item[rows],
        table.repetition[rows].astype(np.uint64),
        table.first_slot[rows],
        table.end_slot[rows],
        taken,
        found,
    )
    if failed >= 0:
        row = int(rows[failed])
        detail = "every slot tried is already swapped or perturbed"
        raise no_room(requests[int(table.request[row])], int(table.repetition[row]), geometry, detail)
    slots[rows] = found


def _refuse_shared_slots(requests: Sequence[Copies], table: CopyTable, geometry: Geometry) -> None:
    rows = np.flatnonzero(table.fixed_slot != FLOATING)
    order = rows[np.argsort(table.fixed_slot[rows], kind="stable")]
    same = np.flatnonzero(np.diff(table.fixed_slot[order]) == 0)
    if same.size:
        first, second = (requests[int(table.request[order[same[0] + k]])] for k in (0, 1))
        slot = int(table.fixed_slot[order[same[0]]])
        raise UserError(
            f"Experiments {first.name} and {second.name} both replace or perturb the whole of slot {slot} (step {geometry.step(slot)}). "
            "Give one of them other steps."
        )
