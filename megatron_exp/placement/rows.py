"""Requests spelt out as one row per copy, in rank order: the input of placement."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_exp import seeding
from megatron_exp.errors import UserError
from megatron_exp.stream.slot import Geometry

FLOATING = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Value of `fixed_slot` where the place is to be found."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Copies:
    """All copies of one request.

    name: experiment, for messages; condition likewise. key: of the candidate sequences. item, repetitions: counters of those sequences.
    length: tokens to write, or 0 for the whole slot. first_slot, end_slot: uint64 [copies], window of each copy. fixed_slot, fixed_offset:
    uint64 [copies], given places or FLOATING.
    """

    name: str
    condition: str
    key: int
    item: int
    length: int
    exclusive: bool
    first_slot: np.ndarray
    end_slot: np.ndarray
    fixed_slot: np.ndarray
    fixed_offset: np.ndarray

    @property
    def num(self) -> int:
        return len(self.first_slot)


def candidate_key(placement_seed: int, experiment: str, arm: str, kind: str) -> int:
    """Key of the candidate sequences of one experiment's copies; item, repetition and draw are the counter."""
    return seeding.key(placement_seed, "place", experiment, arm, kind)


def window_copies(start: int, end: int, copies: int, geometry: Geometry, *, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """First and end slot of each copy's window: all [start, end) steps, or (`even`) the copy's own part of them."""
    repetition = np.arange(copies + 1, dtype=np.int64)
    batch = geometry.global_batch_size
    if even:
        borders = (start * batch + repetition * (end - start) * batch // copies).astype(np.uint64)
        return borders[:-1], borders[1:]
    return np.full(copies, start * batch, np.uint64), np.full(copies, end * batch, np.uint64)


def floating(copies: int) -> np.ndarray:
    """uint64 [copies] of FLOATING."""
    return np.full(copies, FLOATING, dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class CopyTable:
    """Rows of several requests as parallel arrays, in rank order, with the way back to the request."""

    request: np.ndarray
    repetition: np.ndarray
    key: np.ndarray
    item: np.ndarray
    length: np.ndarray
    first_slot: np.ndarray
    end_slot: np.ndarray
    fixed_slot: np.ndarray
    fixed_offset: np.ndarray

    @classmethod
    def of(cls, requests: Sequence[Copies], chosen: Sequence[int]) -> "CopyTable":
        """The rows of requests[i] for i in `chosen`, in that order."""
        parts = [requests[i] for i in chosen]
        counts = [part.num for part in parts]

        def spread(values: list[int], dtype: type) -> np.ndarray:
            return np.repeat(np.asarray(values, dtype=dtype), counts)

        def join(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts]) if parts else np.empty(0, np.uint64)

        return cls(
            request=spread(list(chosen), np.int64),
            repetition=np.concatenate([np.arange(n, dtype=np.int64) for n in counts]) if parts else np.empty(0, np.int64),
            key=spread([part.key for part in parts], np.uint64),
            item=spread([part.item for part in parts], np.uint64),
            length=spread([part.length for part in parts], np.int64),
            first_slot=join("first_slot"),
            end_slot=join("end_slot"),
            fixed_slot=join("fixed_slot"),
            fixed_offset=join("fixed_offset"),
        )

    def by_request(self, values: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """Split `values` [rows] by request (its rows lie together); every chosen request is there."""
        parts = {i: values[:0] for i in chosen}
        if not len(values):
            return parts
        starts = np.flatnonzero(np.concatenate([[True], np.diff(self.request) != 0]))
        return parts | {int(self.request[start]): part for start, part in zip(starts, np.split(values, starts[1:]), strict=True)}


def check_copies(copies: Copies, geometry: Geometry) -> None:
    """UserError where a request can never be met: payload longer than a slot, window outside the run or empty."""
    where = f"Experiment {copies.name}, condition {copies.condition}, item {copies.item}"
    if copies.length > geometry.sequence_length:
        raise UserError(
            f"{where}: the payload has {copies.length} tokens but a slot holds {geometry.sequence_length}. Shorten the text or raise geometry.sequence_length."
        )
    ends = np.where(copies.fixed_slot == FLOATING, copies.end_slot, copies.fixed_slot + np.uint64(1))
    if copies.num and int(ends.max()) > geometry.num_slots:
        last = -(-int(ends.max()) // geometry.global_batch_size)
        raise UserError(f"{where}: it asks for steps up to {last}, but the run has {geometry.steps}. Move the window.")
    if np.any((copies.fixed_slot == FLOATING) & (copies.first_slot >= copies.end_slot)):
        raise UserError(
            f"{where}: its window holds no slot (fewer steps than copies, or an empty window). Widen the window or ask for fewer copies."
        )


def no_room(copies: Copies, repetition: int, geometry: Geometry, detail: str) -> UserError:
    """The error for a copy whose window is full."""
    first, end = (int(border[repetition]) for border in (copies.first_slot, copies.end_slot))
    size = f"of {copies.length} tokens " if copies.length else ""
    return UserError(
        f"Experiment {copies.name}, condition {copies.condition}: copy {repetition} of item {copies.item} {size}finds no free place in steps "
        f"{geometry.step(first)} to {-(-end // geometry.global_batch_size)} ({end - first} slots, {(end - first) * geometry.sequence_length} tokens): "
        f"{detail}. Widen the window, ask for fewer or shorter copies, or train for more steps."
    )
