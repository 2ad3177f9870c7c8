"""The inner loop of placement, compiled: the first free candidate of each copy, in rank order."""

from typing import NamedTuple

import numba
import numpy as np

MAX_DRAWS = 1 << 14
"""Candidates a copy tries before its window counts as full."""

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


@numba.njit(cache=True)
def philox_words(key: np.uint64, item: np.uint64, repetition: np.uint64, draw: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Two 64-bit words of `seeding.philox` with counter (draw, repetition, item low, item high)."""
    k0, k1 = key & _LOW_32, key >> _SHIFT_32
    x0, x1, x2, x3 = draw & _LOW_32, repetition & _LOW_32, item & _LOW_32, item >> _SHIFT_32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (p1 >> _SHIFT_32) ^ x1 ^ k0, p1 & _LOW_32, (p0 >> _SHIFT_32) ^ x3 ^ k1, p0 & _LOW_32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW_32, (k1 + np.uint64(0xBB67AE85)) & _LOW_32
    return x0 | (x1 << _SHIFT_32), x2 | (x3 << _SHIFT_32)


@numba.njit(cache=True)
def scale_word(word: np.uint64, high: np.uint64) -> np.uint64:
    """floor(word * high / 2**64) for high < 2**32 or a little bias below 2**-31 above it."""
    low = ((word & _LOW_32) * (high & _LOW_32)) >> _SHIFT_32
    middle = (word >> _SHIFT_32) * (high & _LOW_32) + low
    middle2 = (word & _LOW_32) * (high >> _SHIFT_32) + (middle & _LOW_32)
    return (word >> _SHIFT_32) * (high >> _SHIFT_32) + (middle >> _SHIFT_32) + (middle2 >> _SHIFT_32)


@numba.njit(cache=True)
def table_find(table: np.ndarray, slot: np.uint64) -> np.int64:
    """Index of `slot` in an open-addressing table, or of the empty place where it belongs."""
    mask = len(table) - 1
    index = np.int64((slot * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & mask
    while table[index] != _EMPTY and table[index] != slot:
        index = (index + 1) & mask
    return index


def table_of(slots: np.ndarray, capacity: int) -> np.ndarray:
    """An open-addressing table holding `slots`, with room for `capacity` entries at half load."""
    table = np.full(1 << max(4, int(2 * capacity).bit_length()), _EMPTY, dtype=np.uint64)
    insert_all(table, slots)
    return table


@numba.njit(cache=True)
def insert_all(table: np.ndarray, slots: np.ndarray) -> None:
    """Put `slots` into the table."""
    for slot in slots:
        table[table_find(table, slot)] = slot


@numba.njit(cache=True)
def first_free_slots(key, item, repetition, first, end, taken, out) -> int:  # type: ignore[no-untyped-def]  # numba infers the types
    """Whole-slot copies: write each copy's slot to `out` and mark it in `taken`. Returns the row that found none, or -1."""
    for row in range(len(key)):
        found = False
        for draw in range(MAX_DRAWS):
            word, _ = philox_words(key[row], item[row], repetition[row], np.uint64(draw))
            slot = first[row] + scale_word(word, end[row] - first[row])
            index = table_find(taken, slot)
            if taken[index] == _EMPTY:
                taken[index] = slot
                out[row] = slot
                found = True
                break
        if not found:
            return row
    return -1


class State(NamedTuple):
    """Where token copies are so far. Copies of one slot form a chain: `table` finds the slot, `head` its last copy, `following` the next.

    slots, offsets: uint64 and int64 [rows], the places found.
    """

    table: np.ndarray
    head: np.ndarray
    following: np.ndarray
    slots: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, num: int) -> "State":
        """Nothing placed yet, room for `num` rows that may each move several times."""
        table = table_of(np.empty(0, np.uint64), 2 * num)
        empty = np.full(len(table), -1, dtype=np.int64)
        return cls(table, empty, np.full(num, -1, np.int64), np.full(num, _EMPTY), np.zeros(num, np.int64))


@numba.njit(cache=True)
def first_free_places(  # type: ignore[no-untyped-def]  # numba infers the types
    rows,
    key,
    item,
    repetition,
    length,
    first,
    end,
    fixed_slot,
    fixed_offset,
    allowed,
    blocked,
    sequence_length,
    table,
    head,
    following,
    slots,
    offsets,
) -> int:
    """Place token copies `rows` in that order. Returns the row that found no place, or -1.

    allowed: sorted uint64 slots that may be used (first and end are then indices into it), or empty for all. blocked: table of slots
    closed to all. A row that moves leaves its old chain as it is: it moves only because that slot was closed, and a closed slot's chain
    is never walked again.
    """
    for row in rows:
        is_fixed = fixed_slot[row] != _EMPTY
        room = np.uint64(sequence_length - length[row] + 1)
        found = False
        draws = 1 if is_fixed else (MAX_DRAWS if end[row] > first[row] else 0)
        for draw in range(draws):
            if is_fixed:
                slot, offset = fixed_slot[row], np.int64(fixed_offset[row])
            else:
                word_a, word_b = philox_words(key[row], item[row], repetition[row], np.uint64(draw))
                place = first[row] + scale_word(word_a, end[row] - first[row])
                slot = allowed[place] if len(allowed) else place
                offset = np.int64(scale_word(word_b, room))
            if blocked[table_find(blocked, slot)] != _EMPTY:
                continue
            index = table_find(table, slot)
            other = head[index] if table[index] != _EMPTY else -1
            while other >= 0 and (offset + length[row] <= offsets[other] or offsets[other] + length[other] <= offset):
                other = following[other]
            if other >= 0:
                continue
            table[index] = slot
            following[row] = head[index]
            head[index] = row
            slots[row], offsets[row] = slot, offset
            found = True
            break
        if not found:
            return row
    return -1
