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
    """An open-addressing table holding `slots`, with room for `capacity` entries at three quarters of its load at most."""
    table = np.full(1 << max(4, (4 * capacity // 3).bit_length()), _EMPTY, dtype=np.uint64)
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

    slots, offsets: uint64 and int32 [rows], the places found.
    """

    table: np.ndarray
    head: np.ndarray
    following: np.ndarray
    slots: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, slots: np.ndarray, num_closed: int) -> "State":
        """No token copy placed yet, room for all of `slots` [rows]; rows lie in as many slots at most, and have left `num_closed` others at most."""
        num = len(slots)
        table = table_of(np.empty(0, np.uint64), num + num_closed)
        empty = np.full(len(table), -1, dtype=np.int32)
        return cls(table, empty, np.full(num, -1, np.int32), slots, np.zeros(num, np.int32))


@numba.njit(cache=True)
def first_free_places(  # type: ignore[no-untyped-def]  # numba infers the types
    rows,
    request,
    bounds,
    requests,
    given_slots,
    given_offsets,
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

    requests: rows.REQUEST. allowed: sorted uint64 slots that may be used, or empty for all. blocked: table of slots closed to all. A row that
    moves leaves its old chain as it is, and there its slot is another: a token copy moves only because the slot was closed to all, and a
    closed slot's chain is never walked again; a splice was alone in its chain.
    """
    for row in rows:
        one = requests[request[row]]
        repetition = row - bounds[request[row]]
        is_given = one["given"] >= 0
        length = one["length"]
        room = np.uint64(sequence_length - length + 1)
        first, end = window(one["start"], one["end"], one["even"], repetition, bounds[request[row] + 1] - bounds[request[row]], allowed)
        found = False
        draws = 1 if is_given else (MAX_DRAWS if end > first else 0)
        for draw in range(draws):
            if is_given:
                slot, offset = given_slots[one["given"] + repetition], np.int64(given_offsets[one["given"] + repetition])
            else:
                word_a, word_b = philox_words(one["key"], one["item"], np.uint64(repetition), np.uint64(draw))
                place = first + scale_word(word_a, end - first)
                slot = allowed[place] if len(allowed) else place
                offset = np.int64(scale_word(word_b, room))
            if blocked[table_find(blocked, slot)] != _EMPTY:
                continue
            index = table_find(table, slot)
            other = head[index] if table[index] != _EMPTY else -1
            while other >= 0:
                if slots[other] == slot:
                    theirs = requests[request[other]]
                    if theirs["splice"] or (offset < offsets[other] + theirs["length"] and offsets[other] < offset + length):
                        break
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


@numba.njit(cache=True)
def window(start, end, even, repetition, copies, allowed):  # type: ignore[no-untyped-def]  # numba infers the types
    """First and end candidate of a copy as uint64: slots, or places in `allowed` where that is not empty."""
    if even:
        width = end - start
        start, end = start + repetition * width // copies, start + (repetition + 1) * width // copies
    first, last = np.uint64(start), np.uint64(end)
    if len(allowed):
        first, last = np.uint64(np.searchsorted(allowed, first)), np.uint64(np.searchsorted(allowed, last))
    return first, last


@numba.njit(cache=True)
def candidates(rows, request, bounds, requests, given_slots, allowed, first_draw, out) -> None:  # type: ignore[no-untyped-def]  # numba infers the types
    """Write the slots of draws first_draw, first_draw + 1, ... of each row to `out` [rows, draws]; 2**64 - 1 where there are none."""
    for position in range(len(rows)):
        number = request[rows[position]]
        one = requests[number]
        repetition = rows[position] - bounds[number]
        first, end = window(one["start"], one["end"], one["even"], repetition, bounds[number + 1] - bounds[number], allowed)
        for draw in range(out.shape[1]):
            out[position, draw] = _EMPTY
            if one["given"] >= 0:
                out[position, draw] = given_slots[one["given"] + repetition] if first_draw + draw == 0 else _EMPTY
            elif end > first:
                word, _ = philox_words(one["key"], one["item"], np.uint64(repetition), np.uint64(first_draw + draw))
                place = first + scale_word(word, end - first)
                out[position, draw] = allowed[place] if len(allowed) else place


@numba.njit(cache=True)
def first_free_boundaries(  # type: ignore[no-untyped-def]  # numba infers the types
    rows,
    request,
    bounds,
    requests,
    given_offsets,
    tried,
    first_draw,
    starts,
    boundaries,
    blocked,
    sequence_length,
    table,
    head,
    following,
    slots,
    offsets,
) -> int:
    """Place splices `rows` in that order, each at a keyed one of the boundaries of the first slot that is free as a whole.

    tried: uint64 [rows, draws] candidate slots; the boundaries of candidate (p, d) are boundaries[starts[k] : starts[k + 1]] with k = p * draws + d,
    rising. blocked: table of slots closed to splices; all others hold either nothing or rows that lie there now. Returns the
    position in `rows` of the first that found no place, or len(rows).
    """
    for position in range(len(rows)):
        row = rows[position]
        one = requests[request[row]]
        repetition = row - bounds[request[row]]
        found = False
        for draw in range(tried.shape[1]):
            slot = tried[position, draw]
            if slot == _EMPTY or blocked[table_find(blocked, slot)] != _EMPTY:
                continue
            index = table_find(table, slot)
            if table[index] != _EMPTY:
                continue
            low, high = starts[position * tried.shape[1] + draw], starts[position * tried.shape[1] + draw + 1]
            while high > low and boundaries[high - 1] + one["length"] > sequence_length:
                high -= 1
            if high == low:
                continue
            if one["given"] >= 0:
                offset = np.int64(given_offsets[one["given"] + repetition])
                low = low + np.searchsorted(boundaries[low:high], offset)
                if low == high or boundaries[low] != offset:
                    continue
            else:
                _, word = philox_words(one["key"], one["item"], np.uint64(repetition), np.uint64(first_draw + draw))
                offset = boundaries[low + np.int64(scale_word(word, np.uint64(high - low)))]
            table[index], head[index] = slot, row
            following[row] = -1
            slots[row], offsets[row] = slot, offset
            found = True
            break
        if not found:
            return position
    return len(rows)
