"""Ragged sequences as few, well filled, rectangular batches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH_MULTIPLE = 16
"""Widths are rounded up to this: few distinct shapes, divisible among tensor-parallel ranks, and what FP8 products need."""


class Batch(NamedTuple):
    """Rows (indices into the caller's sequences, int64 [b]) that are padded to `width` positions and go together."""

    rows: np.ndarray
    width: int


def pack(lengths: np.ndarray, max_tokens: int, max_width: int, max_rows: int | None = None, max_spread: int | None = None) -> list[Batch]:
    """Batches of at most `max_tokens` padded positions, each of rows of nearly equal length.

    The longest come first, so what does not fit in memory fails at once. Every row is in exactly one batch; a row longer than
    `max_tokens` has a batch of its own. The result depends on `lengths` alone, never on the number of processes.

    Args:
        lengths: positions each row needs, int [n], at most `max_width`.
        max_tokens: bound on rows x width of a batch.
        max_width: the model's sequence length, which rounding up never exceeds.
        max_rows: bound on the rows of a batch.
        max_spread: bound on how much longer the longest row of a batch is than its shortest.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    first = 0
    while first < len(order):
        width = min(-(-int(lengths[order[first]]) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, max_width)
        num_rows = max(1, min(max_tokens // max(1, width), max_rows or len(order)))
        if max_spread is not None:
            shortest = int(lengths[order[first]]) - max_spread
            num_rows = min(num_rows, int(np.searchsorted(-lengths[order[first:]], -shortest, side="right")))
        batches.append(Batch(order[first : first + num_rows], width))
        first += num_rows
    return batches


def padded(sequences: Sequence[np.ndarray], width: int) -> np.ndarray:
    """int64 [len(sequences), width]: each sequence cut or padded on the right with id 0.

    Attention is causal, so what stands right of a position cannot change it.
    """
    filled = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        kept = sequence[:width]
        filled[row, : len(kept)] = kept
    return filled


def share(sequences: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The sequences worth a forward pass, and for every input the index of the one that answers for it (int64 [n]).

    A sequence that equals another, or its beginning, is answered by that other: with causal attention the losses are the same.
    """
    encoded = [np.ascontiguousarray(sequence, dtype=">u4").tobytes() for sequence in sequences]
    order = sorted(range(len(encoded)), key=lambda index: encoded[index], reverse=True)  # a prefix follows what it begins
    kept: list[np.ndarray] = []
    answered_by = np.empty(len(sequences), dtype=np.int64)
    last = b""
    for index in order:
        if not kept or not last.startswith(encoded[index]):
            kept.append(np.asarray(sequences[index]))
            last = encoded[index]
        answered_by[index] = len(kept) - 1
    return kept, answered_by
