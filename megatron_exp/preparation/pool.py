"""Handing out pool slots by key, so that adding an experiment changes no other experiment's share."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_exp import seeding
from megatron_exp.errors import UserError
from megatron_exp.stream.slot import POOL

_CHUNK = 16
_AT_ONCE = 4096
_MAX_DRAWS = 4096


@dataclass(eq=False)
class PoolAllocator:
    """Pool places [0, reserved) belong to validation; the rest is given out.

    Every unit asked for has its own keyed sequence of candidate places and takes the first that is free, like placement does.
    """

    num_slots: int
    reserved: int
    seed: int
    _taken: set[int] = field(default_factory=set)

    @property
    def num_free(self) -> int:
        """Pool slots that nobody has."""
        return self.num_slots - self.reserved - len(self._taken)

    def take(self, experiment: str, purpose: str, num: int, unfit: Collection[int] = ()) -> np.ndarray:
        """uint64 [num] pool slot ids, disjoint from all handed out before and from `unfit`; UserError where the pool is used up."""
        away = {slot - POOL for slot in unfit if slot - POOL >= self.reserved} - self._taken
        self._taken |= away
        try:
            return self._take(experiment, purpose, num)
        finally:
            self._taken -= away

    def _take(self, experiment: str, purpose: str, num: int) -> np.ndarray:
        free = self.num_free
        if num > free:
            raise UserError(
                f"Experiment {experiment} needs {num} pool slots for {purpose}, but {free} of {self.num_slots} are free "
                f"({self.reserved} are for validation). Raise pool.slots by at least {num - free}."
            )
        key = seeding.key(self.seed, "pool", experiment, purpose)
        blocks = (range(first, min(first + _AT_ONCE, num)) for first in range(0, num, _AT_ONCE))
        return np.array([POOL + place for units in blocks for place in self._first_free(key, units)], dtype=np.uint64)

    def _first_free(self, key: int, units: range) -> Iterator[int]:
        """The place of every unit, taken as it is given."""
        for unit, places in zip(units, self._drawn(key, 0, np.array(units, dtype=np.uint64)).tolist(), strict=True):
            place = next((place for place in places if place not in self._taken), None)
            if place is None:
                place = self._later_free(key, unit)
            self._taken.add(place)
            yield place

    def _later_free(self, key: int, unit: int) -> int:
        for start in range(_CHUNK, _MAX_DRAWS, _CHUNK):
            for place in self._drawn(key, start, np.array([unit], dtype=np.uint64))[0].tolist():
                if place not in self._taken:
                    return place
        return next(place for place in range(self.reserved, self.num_slots) if place not in self._taken)  # a nearly empty pool

    def _drawn(self, key: int, start: int, units: np.ndarray) -> np.ndarray:
        """uint64 [unit, draw]: places that each unit draws, `_CHUNK` of them from draw `start` on."""
        words = seeding.words64(key, np.arange(start, start + _CHUNK, dtype=np.uint64), units[:, None])
        return seeding.multiply_high(words, self.num_slots - self.reserved) + np.uint64(self.reserved)
