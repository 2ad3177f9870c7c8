"""Handing out pool slots by key, so that adding an experiment changes no other experiment's share."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from megatron_exp import seeding
from megatron_exp.errors import UserError
from megatron_exp.stream.slot import POOL

_CHUNK = 16
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
        return np.array([POOL + self._first_free(key, unit) for unit in range(num)], dtype=np.uint64)

    def _first_free(self, key: int, unit: int) -> int:
        for start in range(0, _MAX_DRAWS, _CHUNK):
            words = seeding.words64(key, np.arange(start, start + _CHUNK, dtype=np.uint64), unit)
            for place in map(int, seeding.multiply_high(words, self.num_slots - self.reserved) + np.uint64(self.reserved)):
                if place not in self._taken:
                    self._taken.add(place)
                    return place
        rest = next(place for place in range(self.reserved, self.num_slots) if place not in self._taken)  # a nearly empty pool
        self._taken.add(rest)
        return rest
