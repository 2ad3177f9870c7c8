"""A keyed permutation of range(n) that is evaluated point by point: no table, O(1) time and memory, invertible.

A Feistel network over pairs (left, right) in base ceil(sqrt(n)), with cycle walking for the few values above n
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). It is meant for shuffling data, not for secrecy.
Feistel rounds over an odd base are even permutations, which shows in tiny domains: up to 1,024 values a sorted table of
words is used instead, where every permutation is equally likely.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_exp.seeding import words64

_ROUNDS = 10
_TABLE_SIZE = 1024
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FULL_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Permutation:
    """The permutation of range(size) that belongs to `key`; 1 <= size < 2**62."""

    size: int
    key: int

    def __post_init__(self) -> None:
        if not 1 <= self.size < 1 << 62:
            raise ValueError(f"a permutation needs 1 <= size < 2**62, got {self.size}")

    @cached_property
    def _table(self) -> np.ndarray:
        return np.argsort(words64(self.key, np.arange(self.size, dtype=np.uint64)), kind="stable").astype(np.uint64)

    @cached_property
    def _side(self) -> int:
        return math.isqrt(self.size - 1) + 1

    @cached_property
    def _round_keys(self) -> np.ndarray:
        return words64(self.key, np.arange(_ROUNDS, dtype=np.uint64))

    @cached_property
    def _whole_round_keys(self) -> list[int]:
        return [int(word) for word in self._round_keys]

    def forward(self, values: np.ndarray | int) -> np.ndarray:
        """Images of `values` (each in range(size)); uint64, same shape."""
        if self.size <= _TABLE_SIZE:
            return self._table[np.asarray(values, dtype=np.int64)]
        if isinstance(values, int):
            return np.asarray(self._forward_one(values), dtype=np.uint64)
        return self._walk(values, self._encrypt)

    def inverse(self, values: np.ndarray | int) -> np.ndarray:
        """The values whose images these are; uint64, same shape."""
        if self.size <= _TABLE_SIZE:
            return np.argsort(self._table)[np.asarray(values, dtype=np.int64)].astype(np.uint64)
        return self._walk(values, self._decrypt)

    def _walk(self, values: np.ndarray | int, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        start = np.asarray(values, dtype=np.uint64)
        if start.size and int(start.max()) >= self.size:
            raise IndexError(f"{int(start.max())} is not below {self.size}")
        result = step(start.ravel())
        outside = np.flatnonzero(result >= self.size)
        while outside.size:
            result[outside] = step(result[outside])
            outside = outside[result[outside] >= self.size]
        return result.reshape(start.shape)

    def _forward_one(self, value: int) -> int:
        """The same for one value, in whole numbers of Python: an array operation costs more than all ten rounds, and training asks one slot at a time."""
        if not 0 <= value < self.size:
            raise IndexError(f"{value} is not below {self.size}")
        side, mix_1, mix_2 = self._side, int(_MIX_1), int(_MIX_2)
        while True:
            left, right = divmod(value, side)
            for round_key in self._whole_round_keys:
                mixed = (right + round_key) & _FULL_64
                mixed = ((mixed ^ (mixed >> 30)) * mix_1) & _FULL_64
                mixed = ((mixed ^ (mixed >> 27)) * mix_2) & _FULL_64
                left, right = right, (left + ((mixed >> 32) * side >> 32)) % side
            value = left * side + right
            if value < self.size:
                return value

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        side = np.uint64(self._side)
        left, right = np.divmod(values, side)
        for round_key in self._round_keys:
            left, right = right, (left + self._round(right, round_key)) % side
        return left * side + right

    def _decrypt(self, values: np.ndarray) -> np.ndarray:
        side = np.uint64(self._side)
        left, right = np.divmod(values, side)
        for round_key in self._round_keys[::-1]:
            left, right = (right + side - self._round(left, round_key)) % side, left
        return left * side + right

    def _round(self, half: np.ndarray, round_key: np.uint64) -> np.ndarray:
        """A keyed word in range(side) for each half (splitmix64's finaliser, then scaling instead of a remainder)."""
        mixed = half + round_key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        return ((mixed >> np.uint64(32)) * np.uint64(self._side)) >> np.uint64(32)
