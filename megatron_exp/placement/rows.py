"""Requests and their copies as columns: the input and the output of placement."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_exp import seeding
from megatron_exp.errors import UserError
from megatron_exp.stream.slot import Geometry

FLOATING = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Value of `fixed_slot` where the place is to be found."""


class Copies(NamedTuple):
    """All copies of one request.

    experiment, condition: for rank and messages. key: of the candidate sequences; item and repetition are its counters. length: tokens to
    write, or 0 for the whole slot. start, end: window in slots; `even` gives copy r the r-th of `num` equal parts of it. fixed: given
    (slots, offsets), uint64 [num] each, or None where places are to be found.
    """

    experiment: str
    condition: str
    key: int
    item: int
    length: int
    exclusive: bool
    num: int
    start: int = 0
    end: int = 0
    even: bool = False
    fixed: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"Experiment {self.experiment}, condition {self.condition}, item {self.item}"


@lru_cache(maxsize=4096)
def candidate_key(placement_seed: int, experiment: str, arm: str, kind: str) -> int:
    """Key of the candidate sequences of one experiment's copies; item, repetition and draw are the counter."""
    return seeding.key(placement_seed, "place", experiment, arm, kind)


@dataclass(frozen=True, eq=False)
class CopyTable:
    """One row per copy, in rank order (requests as given, then repetition).

    request: index of the copy's request. first_slot, end_slot: its own window. fixed_slot, fixed_offset: given places, or FLOATING.
    """

    requests: Sequence[Copies]
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
    def of(cls, requests: Sequence[Copies]) -> "CopyTable":
        """The rows of all requests."""
        num = len(requests)
        counts = np.fromiter((one.num for one in requests), np.int64, num)
        request = np.repeat(np.arange(num, dtype=np.int32), counts)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        repetition = np.arange(bounds[-1], dtype=np.int64) - bounds[:-1][request]

        def spread(name: str, dtype: type) -> np.ndarray:
            return np.fromiter((getattr(one, name) for one in requests), dtype, num)[request]

        first, end = _windows(spread("start", np.int64), spread("end", np.int64), spread("even", np.bool_), repetition, counts[request])
        fixed_slot, fixed_offset = np.full(len(request), FLOATING), np.zeros(len(request), np.uint64)
        for index, one in enumerate(requests):
            if one.fixed is not None:
                fixed_slot[bounds[index] : bounds[index + 1]], fixed_offset[bounds[index] : bounds[index + 1]] = one.fixed
        return cls(
            requests=requests,
            request=request,
            repetition=repetition.astype(np.uint64),
            key=spread("key", np.uint64),
            item=spread("item", np.uint64),
            length=spread("length", np.int64),
            first_slot=first,
            end_slot=end,
            fixed_slot=fixed_slot,
            fixed_offset=fixed_offset,
        )

    def __len__(self) -> int:
        return len(self.request)

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [requests + 1]: first row of each request."""
        return np.searchsorted(self.request, np.arange(len(self.requests) + 1))

    @cached_property
    def experiments(self) -> list[slice]:
        """Rows of each experiment (consecutive requests of one name)."""
        names = [one.experiment for one in self.requests]
        starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
        return [slice(int(self.bounds[a]), int(self.bounds[b])) for a, b in pairwise([*starts, len(names)])]

    def no_room(self, row: int, geometry: Geometry, detail: str) -> UserError:
        """The error for a copy that finds no place."""
        one, repetition = self.requests[int(self.request[row])], int(self.repetition[row])
        if self.fixed_slot[row] != FLOATING:
            return UserError(
                f"{one.name}: copy {repetition} must be at slot {int(self.fixed_slot[row])}, offset {int(self.fixed_offset[row])}, which is exclusive "
                "or holds another copy. Choose another place, or list this experiment before the one that holds it."
            )
        first, end = int(self.first_slot[row]), int(self.end_slot[row])
        size = f"of {one.length} tokens " if one.length else ""
        return UserError(
            f"{one.name}: copy {repetition} {size}finds no free place in steps {geometry.step(first)} to "
            f"{-(-end // geometry.global_batch_size)} ({end - first} slots, {(end - first) * geometry.sequence_length} tokens): {detail}. "
            "Widen the window, ask for fewer or shorter copies, or train for more steps."
        )

    def check(self, geometry: Geometry) -> None:
        """UserError where a request can never be met: payload longer than a slot, window outside the run or empty."""
        if not len(self):
            return
        floating = self.fixed_slot == FLOATING
        last = np.where(floating, self.end_slot, self.fixed_slot + np.uint64(1))
        for row in np.flatnonzero(self.length > geometry.sequence_length)[:1]:
            raise UserError(
                f"{self._name(row)}: the payload has {self.length[row]} tokens but a slot holds {geometry.sequence_length}. "
                "Shorten the text or raise geometry.sequence_length."
            )
        for row in np.flatnonzero(last > geometry.num_slots)[:1]:
            steps = -(-int(last[row]) // geometry.global_batch_size)
            raise UserError(f"{self._name(row)}: it asks for steps up to {steps}, but the run has {geometry.steps}. Move the window.")
        for row in np.flatnonzero(floating & (self.first_slot >= self.end_slot))[:1]:
            raise UserError(
                f"{self._name(row)}: its window holds no slot (fewer slots than copies, or an empty window). Widen it or ask for fewer copies."
            )

    def _name(self, row: int) -> str:
        return self.requests[int(self.request[row])].name


def _windows(
    start: np.ndarray, end: np.ndarray, even: np.ndarray, repetition: np.ndarray, copies: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and end slot of each copy: the whole window, or its own part of it."""
    width = end - start
    first = np.where(even, start + repetition * width // copies, start)
    last = np.where(even, start + (repetition + 1) * width // copies, end)
    return first.astype(np.uint64), last.astype(np.uint64)
