"""Placement: a pure function from requests, geometry and seed to a place for every copy.

Each copy has its own endless keyed sequence of candidate places and takes the first that is free of exclusive slots and
of copies of earlier rank (order of experiments in the file, then item, then repetition). So appending a token
experiment moves nothing placed before, and appending an exclusive one moves only the copies it hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.placement import search
from megatron_exp.placement.rows import FLOATING, Copies, CopyTable, check_copies
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
    """A place for every copy of every request, in the order of `requests` (which is their rank).

    Raises UserError where a copy finds no place, naming experiment, condition, room and remedy; nothing is dropped.
    """
    for request in requests:
        check_copies(request, geometry)
    whole = [i for i, request in enumerate(requests) if request.length == 0]
    partial = [i for i, request in enumerate(requests) if request.length > 0]
    slots, taken = _place_whole(requests, whole, geometry)
    allowed = _allowed_slots(taken, geometry, budget) if budget else np.empty(0, np.uint64)
    exclusive = np.concatenate([slots[i] for i in whole if requests[i].exclusive] or [np.empty(0, np.uint64)])
    token_slots, offsets = _place_tokens(requests, partial, geometry, exclusive, allowed)
    return [
        Placed(token_slots[i], offsets[i]) if i in token_slots else Placed(slots[i], np.zeros(len(slots[i]), np.int64))
        for i in range(len(requests))
    ]


def _place_whole(requests: Sequence[Copies], chosen: list[int], geometry: Geometry) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Slots of the whole-slot requests, and all of them together. No two of them share a slot."""
    table = CopyTable.of(requests, chosen)
    out = table.fixed_slot.copy()
    fixed = table.fixed_slot != FLOATING
    _refuse_shared_slots(requests, table, geometry)
    taken = search.table_of(out[fixed], len(out))
    row = np.flatnonzero(~fixed)
    found = np.empty(len(row), np.uint64)
    failed = search.first_free_slots(
        table.key[row], table.item[row], table.repetition[row].astype(np.uint64), table.first_slot[row], table.end_slot[row], taken, found
    )
    if failed >= 0:
        failed = int(row[failed])
        detail = "every slot tried is already swapped or perturbed"
        raise _no_room(requests[int(table.request[failed])], int(table.repetition[failed]), geometry, detail)
    out[row] = found
    return _by_request(table, out, chosen), out


def _by_request(table: CopyTable, values: np.ndarray, chosen: list[int]) -> dict[int, np.ndarray]:
    """Split `values` (rows in rank order, so each request's rows lie together) by request; every chosen one is there."""
    parts = {i: values[:0] for i in chosen}
    if not len(values):
        return parts
    starts = np.flatnonzero(np.concatenate([[True], np.diff(table.request) != 0]))
    return parts | {int(table.request[start]): part for start, part in zip(starts, np.split(values, starts[1:]), strict=True)}


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


def _allowed_slots(taken: np.ndarray, geometry: Geometry, budget: SlotBudget) -> np.ndarray:
    """Sorted slots that token copies may use: the drawn ones that are not already whole-slot rewrites."""
    rest = budget.num_slots - len(np.unique(taken))
    if rest < 0:
        raise UserError(
            f"budget.fraction allows {budget.num_slots} touched slots, but swaps and noise alone need {len(np.unique(taken))}. "
            "Raise the fraction or ask for fewer."
        )
    order = Permutation(geometry.num_slots, key(budget.seed, "budget")).forward(np.arange(budget.num_slots, dtype=np.uint64))
    return np.sort(order[~np.isin(order, taken)][:rest])


def _place_tokens(
    requests: Sequence[Copies], chosen: list[int], geometry: Geometry, exclusive: np.ndarray, allowed: np.ndarray
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    table = CopyTable.of(requests, chosen)
    first, end = table.first_slot, table.end_slot
    if len(allowed):
        first, end = (np.searchsorted(allowed, border).astype(np.uint64) for border in (first, end))
    slots, offsets = np.zeros(len(first), np.uint64), np.zeros(len(first), np.int64)
    failed = search.first_free_places(
        table.key,
        table.item,
        table.repetition.astype(np.uint64),
        table.length,
        first,
        end,
        table.fixed_slot,
        table.fixed_offset,
        allowed,
        search.table_of(exclusive, len(exclusive)),
        geometry.sequence_length,
        slots,
        offsets,
    )
    if failed >= 0:
        used = slots[:failed]
        inside = (used >= table.first_slot[failed]) & (used < table.end_slot[failed])
        detail = f"copies of earlier rank hold {int(table.length[:failed][inside].sum())} tokens there, and {len(exclusive)} slots of the run are exclusive"
        raise _no_room(requests[int(table.request[failed])], int(table.repetition[failed]), geometry, detail)
    return _by_request(table, slots, chosen), _by_request(table, offsets, chosen)


def _no_room(copies: Copies, repetition: int, geometry: Geometry, detail: str) -> UserError:
    start = f"Experiment {copies.name}, condition {copies.condition}: copy {repetition} of item {copies.item}"
    if int(copies.fixed_slot[repetition]) != int(FLOATING):
        slot = int(copies.fixed_slot[repetition])
        return UserError(
            f"{start} must be at slot {slot}, offset {int(copies.fixed_offset[repetition])}, which is taken ({detail}). Choose another place, "
            "or list this experiment before the one that holds it."
        )
    first, end = (int(border[repetition]) for border in (copies.first_slot, copies.end_slot))
    room = (end - first) * geometry.sequence_length
    size = f"of {copies.length} tokens " if copies.length else ""
    return UserError(
        f"{start} {size}finds no free place in steps {geometry.step(first)} to {-(-end // geometry.global_batch_size)} "
        f"({end - first} slots, {room} tokens): {detail}. "
        "Widen the window, ask for fewer or shorter copies, or train for more steps."
    )
