"""The compact overlay index: two memory-mapped arrays that answer "what happens in slot k" with one binary search."""

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.errors import UserError
from megatron_exp.shards.checksums import ARRAY_ERRORS
from megatron_exp.shards.indexed import plain_map

SLOTS_NAME, ENTRIES_NAME = "overlay-slots.npy", "overlay-entries.npy"
SLOT_DTYPE = np.dtype([("slot", "<u8"), ("start", "<u4")])
ENTRY_DTYPE = np.dtype([("layer", "u1"), ("experiment", "<u2"), ("offset", "<u4"), ("length", "<u4"), ("value", "<u8")])

SPLICE = 0x80
"""Bit of an entry's layer: the payload is spliced in, not written over."""


class OverlayIndex(NamedTuple):
    """slots: sorted SLOT_DTYPE [touched]; entries: ENTRY_DTYPE [insertions], ordered by (slot, layer, offset)."""

    slots: np.ndarray
    entries: np.ndarray

    def within(self, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The touched slots from `first` up to, not including, `stop`, each with its entries in the order of application."""
        numbers, starts = self.slots["slot"], self.slots["start"]
        begin = bisect.bisect_left(numbers, first)  # numpy's own search would copy the mapped column
        end = bisect.bisect_left(numbers, stop, begin)
        bounds = [*starts[begin:end].tolist(), int(starts[end]) if end < len(starts) else len(self.entries)]
        for slot, one, other in zip(numbers[begin:end].tolist(), bounds, bounds[1:], strict=False):
            yield slot, self.entries[one:other]


def build_index(insertions: pa.Table, experiments: list[str]) -> OverlayIndex:
    """The index of an insertions table (sorted by slot, layer, offset); `experiments` gives each name its code."""
    slots = insertions["slot"].to_numpy()
    entries = np.zeros(len(slots), dtype=ENTRY_DTYPE)
    entries["experiment"] = _codes(insertions["experiment"], {name: code for code, name in enumerate(experiments)})
    for name in ("layer", "offset", "length"):
        entries[name] = insertions[name].to_numpy()
    entries["layer"] |= _codes(insertions["kind"], {"splice": SPLICE}).astype(np.uint8)
    entries["value"] = pc.coalesce(
        insertions["payload"], insertions["source_slot"], insertions["key"], pa.scalar(0, pa.uint64())
    ).to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], np.diff(slots) != 0])) if len(slots) else np.empty(0, np.int64)
    table = np.zeros(len(starts), dtype=SLOT_DTYPE)
    table["slot"], table["start"] = slots[starts], starts
    return OverlayIndex(table, entries)


def _codes(column: pa.ChunkedArray, code_of: dict[str, int]) -> np.ndarray:
    """int64: the code of each value of a dictionary column, 0 where it has none."""
    parts = [np.empty(0, np.int64)]
    for chunk in column.chunks:
        of_value = np.array([code_of.get(value, 0) for value in chunk.dictionary.to_pylist()], np.int64)
        parts.append(of_value[chunk.indices.to_numpy()])
    return np.concatenate(parts)


def write_index(directory: Path, index: OverlayIndex) -> None:
    """Write both arrays into `directory` (which is under construction)."""
    np.save(directory / SLOTS_NAME, index.slots, allow_pickle=False)
    np.save(directory / ENTRIES_NAME, index.entries, allow_pickle=False)


def open_index(directory: Path) -> OverlayIndex:
    """Map both arrays; UserError where a file is missing, damaged or of another layout."""
    arrays = []
    for name, dtype in ((SLOTS_NAME, SLOT_DTYPE), (ENTRIES_NAME, ENTRY_DTYPE)):
        path = directory / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ARRAY_ERRORS as error:
            raise UserError(
                f"{path} cannot be read as an overlay index ({error}). The manifest is incomplete or damaged: plan it again."
            ) from error
        if array.dtype != dtype or array.ndim != 1:
            raise UserError(
                f"{path} has layout {array.dtype}, expected {dtype}. It was written by another version: plan the manifest again."
            )
        if isinstance(array, np.memmap) and path.stat().st_size != array.offset + array.nbytes:
            raise UserError(f"{path} has more bytes than its {len(array)} entries take. It was changed after it was written: plan the manifest again.")
        arrays.append(plain_map(array))
    return OverlayIndex(*arrays)
