"""One pass over tokens: a rolling hash, a bit filter, a binary search, an exact comparison. Compiled, run on all cores."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np

from megatron_exp.search.patterns import BASE, Group, Patterns

_BLOCK_TOKENS = 1 << 22
_FIRST_CAPACITY = 1 << 12


class Matches(NamedTuple):
    """Occurrences. patterns: int64 [n], which string. positions: int64 [n], its first token; sorted by (position, pattern)."""

    patterns: np.ndarray
    positions: np.ndarray


def scan(tokens: np.ndarray, patterns: Patterns, *, threads: int = 1) -> Matches:
    """All occurrences of all strings in a one-dimensional array of token ids (overlapping ones too)."""
    blocks = [(group, start) for start in range(0, max(len(tokens), 1), _BLOCK_TOKENS) for group in patterns.groups]

    def work(block: tuple[Group, int]) -> tuple[np.ndarray, np.ndarray]:
        return _scan_block(tokens, *block)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, blocks))
    numbers = np.concatenate([part for part, _ in found] or [np.empty(0, np.int64)])
    positions = np.concatenate([part for _, part in found] or [np.empty(0, np.int64)])
    order = np.lexsort((numbers, positions))
    return Matches(numbers[order], positions[order])


def _scan_block(tokens: np.ndarray, group: Group, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Matches that begin in the block at `start`; the windows that begin there may end in the next one."""
    end = min(start + _BLOCK_TOKENS, len(tokens) - group.anchor + 1)
    if end <= start:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    capacity = _FIRST_CAPACITY
    while True:
        numbers, positions = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        arguments = (group.anchor, group.top, group.filter, group.hashes, group.numbers, group.tokens, group.starts)
        num = _find(tokens, start, end, *arguments, numbers, positions)
        if num <= capacity:
            return numbers[:num], positions[:num]
        capacity = num


@numba.njit(cache=True, nogil=True)
def _find(tokens, start, end, anchor, top, bits, hashes, numbers, strings, starts, out_numbers, out_positions) -> int:
    """Write matches beginning in [start, end); returns how many there are, which may be more than fit."""
    shift = np.uint64(64)
    size = len(bits) * 64
    while size > 1:
        size >>= 1
        shift -= np.uint64(1)
    num = 0
    value = np.uint64(0)
    one = np.uint64(1)
    for i in range(start, start + anchor):
        value = value * BASE + np.uint64(tokens[i]) + one
    position = start
    while True:
        bit = value >> shift
        if (bits[bit >> np.uint64(6)] >> (bit & np.uint64(63))) & one:
            index = np.searchsorted(hashes, value)
            while index < len(hashes) and hashes[index] == value:
                length = starts[index + 1] - starts[index]
                if position + length <= len(tokens):
                    same = True
                    for j in range(length):
                        if tokens[position + j] != strings[starts[index] + j]:
                            same = False
                            break
                    if same:
                        if num < len(out_numbers):
                            out_numbers[num] = numbers[index]
                            out_positions[num] = position
                        num += 1
                index += 1
        position += 1
        if position >= end:
            return num
        value = (value - (np.uint64(tokens[position - 1]) + one) * top) * BASE + np.uint64(tokens[position + anchor - 1]) + one
