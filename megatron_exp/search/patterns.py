"""The strings to search for, prepared once: each is found by a hash of its first tokens and then compared in full."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_exp.errors import UserError

BASE = np.uint64(0x9E3779B97F4A7C15)
"""Multiplier of the rolling hash: odd, so that multiplication is invertible modulo 2**64."""

_FILTER_BITS_PER_PATTERN = 64
_LEAST_FILTER_BITS = 1 << 14
_HASHED_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False)
class Group:
    """Patterns found by the hash of their first `anchor` tokens.

    numbers: int64 [n], indices into the pattern list, sorted by hash. hashes: uint64 [n], sorted. tokens, starts: all patterns one after
    the other, int32, and int64 [n + 1]. filter: uint64 bit table; a window whose bit is 0 matches nothing. top: BASE ** (anchor - 1).
    """

    anchor: int
    numbers: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    filter: np.ndarray
    top: np.uint64


@dataclass(frozen=True, eq=False)
class Patterns:
    """All strings, in groups by the power of two below their length, so that short ones do not weaken the filter of long ones."""

    strings: tuple[np.ndarray, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, strings: Sequence[np.ndarray]) -> "Patterns":
        """Prepare strings of int32 token ids; UserError where one is empty."""
        arrays = tuple(np.ascontiguousarray(string, dtype=np.int32) for string in strings)
        for number, array in enumerate(arrays):
            if not len(array):
                raise UserError(f"String {number} (from 0) has no token. Remove it: the empty string is everywhere.")
        anchors = np.array([1 << (len(array).bit_length() - 1) for array in arrays], dtype=np.int64)
        groups = [_group(arrays, np.flatnonzero(anchors == anchor), int(anchor)) for anchor in np.unique(anchors)]
        return cls(arrays, tuple(groups))

    @property
    def longest(self) -> int:
        """Tokens of the longest string."""
        return max((len(string) for string in self.strings), default=0)


def filter_bit(hashes: np.ndarray, num_bits: int) -> np.ndarray:
    """The filter bit of each hash: its upper bits, which depend on all tokens."""
    return hashes >> np.uint64(64 - (num_bits.bit_length() - 1))


def _group(strings: Sequence[np.ndarray], numbers: np.ndarray, anchor: int) -> Group:
    hashes = _hashes(strings, numbers, anchor)
    order = np.argsort(hashes, kind="stable")
    numbers, hashes = numbers[order], hashes[order]
    num_bits = max(_LEAST_FILTER_BITS, 1 << (_FILTER_BITS_PER_PATTERN * len(numbers)).bit_length())
    table = np.zeros(num_bits // 64, dtype=np.uint64)
    bits = filter_bit(hashes, num_bits)
    np.bitwise_or.at(table, (bits >> np.uint64(6)).astype(np.int64), np.uint64(1) << (bits & np.uint64(63)))
    chosen = [strings[number] for number in numbers]
    starts = np.concatenate([[0], np.cumsum([len(string) for string in chosen])]).astype(np.int64)
    top = np.uint64(pow(int(BASE), anchor - 1, 1 << 64))
    return Group(anchor, numbers.astype(np.int64), hashes, np.concatenate(chosen), starts, table, top)


def _hashes(strings: Sequence[np.ndarray], numbers: np.ndarray, anchor: int) -> np.ndarray:
    """uint64 [numbers]: of the first `anchor` tokens of each, as the scan's rolling hash has it (modulo 2**64)."""
    hashes = np.empty(len(numbers), np.uint64)
    for start in range(0, len(numbers), _HASHED_AT_ONCE):
        part = numbers[start : start + _HASHED_AT_ONCE]
        beginnings = np.stack([strings[number][:anchor] for number in part])
        value = np.zeros(len(part), np.uint64)
        for column in range(anchor):
            value = value * BASE + beginnings[:, column].astype(np.uint64) + np.uint64(1)
        hashes[start : start + len(part)] = value
    return hashes
