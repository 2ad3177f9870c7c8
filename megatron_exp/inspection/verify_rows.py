"""The rows of a manifest's insertions table, one by one and against its items and payloads; columns at a time, for millions of rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import seeding
from megatron_exp.inspection.findings import Finding, rows_where
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import LAYERS
from megatron_exp.manifest.writer import Tables as Written

INSERTIONS_FILE = "insertions.parquet"
_FILE = INSERTIONS_FILE
_WITH_PAYLOAD = ("tokens", "splice")
_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a manifest, read whole, with the hash and the length of every payload."""

    manifest: Manifest
    written: Written
    payload_hashes: list[bytes]
    payload_lengths: np.ndarray

    @property
    def insertions(self) -> pa.Table:
        return self.written.insertions

    @property
    def items(self) -> pa.Table:
        return self.written.items

    @property
    def probes(self) -> pa.Table:
        return self.written.probes

    def column(self, name: str) -> np.ndarray:
        """A column of the insertions as numpy; nulls are 0."""
        column = self.insertions[name]
        filled = pc.fill_null(column, 0) if column.null_count else column
        return filled.to_numpy()

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A dictionary column of the insertions: for each row the number of its value, and the values."""
        return _codes(self.insertions[name])

    def is_kind(self, *kinds: str) -> np.ndarray:
        """Whether each row is of one of these kinds."""
        code, names = self.codes("kind")
        return np.array([name in kinds for name in names], dtype=bool)[code]

    @cached_property
    def owners(self) -> np.ndarray:
        """int64: the row of the items table with each insertion's experiment, item and arm; -1 where there is none."""
        groups: dict[tuple[str, str], int] = {}
        theirs, mine = _groups(self.items, groups), _groups(self.insertions, groups)
        numbers, place = np.unique(self.items["item"].to_numpy(), return_inverse=True)
        names = place * len(groups) + theirs
        order = np.argsort(names, kind="stable")
        item = self.column("item")
        place = np.minimum(np.searchsorted(numbers, item), max(len(numbers) - 1, 0))
        if not len(numbers):
            return np.full(len(item), -1, dtype=np.int64)
        name = place * len(groups) + mine
        found = order[np.minimum(np.searchsorted(names[order], name), len(order) - 1)]
        return np.where((numbers[place] == item) & (names[found] == name), found, -1)

    def of_owner(self, name: str) -> np.ndarray:
        """A dictionary column of the items as codes in the insertions' values of that name, for rows that have an owner; -1 where the value is another."""
        code, values = _codes(self.items[name])
        mine = {value: number for number, value in enumerate(self.codes(name)[1])} if name in self.insertions.column_names else {}
        return np.array([mine.get(value, -1) for value in values], dtype=np.int64)[code][self.owners]


def _rows(tables: Tables) -> Iterator[Finding]:
    """Every row on its own: numbers that must agree, offsets inside the slot, windows kept."""
    geometry, column = tables.manifest.geometry, tables.column
    slot, offset, length, step = column("slot"), column("offset").astype(np.int64), column("length").astype(np.int64), column("step")
    batch = np.uint64(geometry.global_batch_size)
    yield from rows_where(slot >= np.uint64(geometry.num_slots), _FILE, f"its slot is outside the run of {geometry.num_slots} slots")
    yield from rows_where(slot // batch != step, _FILE, "its step is not slot // global batch size")
    yield from rows_where(slot % batch != column("row"), _FILE, "its row is not slot % global batch size")
    yield from rows_where(
        (length < 1) | (offset + length > geometry.sequence_length),
        _FILE,
        f"it does not lie inside the slot's {geometry.sequence_length} tokens",
    )
    yield from rows_where((step < column("window_start")) | (step >= column("window_end")), _FILE, "its step is outside its window")
    kind, kinds = tables.codes("kind")
    layers = np.array([LAYERS.get(name, 255) for name in kinds], dtype=np.uint8)[kind]
    yield from rows_where(layers != column("layer"), _FILE, "its layer does not belong to its kind")
    keys = (offset, column("layer"), slot)
    order = np.arange(len(slot)) if _is_sorted(*reversed(keys)) else np.lexsort(keys)
    yield from rows_where(order != np.arange(len(order)), _FILE, "it is out of order: rows are sorted by slot, layer, offset")


def _identities(tables: Tables) -> Iterator[Finding]:
    """Insertion ids are a function of seed, experiment, arm, kind, item and repetition; repetitions count from 0 without a gap."""
    seed = tables.manifest.config.seeds.placement
    coded = [tables.codes(name) for name in ("experiment", "arm", "kind")]
    combined = np.ravel_multi_index([code for code, _ in coded], [max(len(names), 1) for _, names in coded])
    present, group = np.unique(combined, return_inverse=True)
    names = zip(*(np.unravel_index(present, [max(len(names), 1) for _, names in coded])), strict=True)
    of_group = [seeding.key(seed, "insertion", *(values[code] for (_, values), code in zip(coded, name, strict=True))) for name in names]
    key = np.array(of_group, dtype=np.uint64)[group]
    item, repetition = tables.column("item"), tables.column("repetition")
    expected = np.empty(len(key), dtype=np.uint64)
    for start in range(0, len(key), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        expected[block] = seeding.words64(key[block], repetition[block], item[block])
    yield from rows_where(
        expected != tables.column("insertion_id"), _FILE, "its insertion_id is not that of its experiment, arm, kind, item and repetition"
    )
    order = np.lexsort((repetition, item, group))
    first = np.append(True, (group[order][1:] != group[order][:-1]) | (item[order][1:] != item[order][:-1]))[: len(order)]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    wrong = np.zeros(len(order), dtype=bool)
    wrong[order] = rank != repetition[order]
    yield from rows_where(wrong, _FILE, "the repetitions of its item do not count 0, 1, 2, ...: a copy is missing or there twice")


def _items(tables: Tables) -> Iterator[Finding]:
    """Every insertion belongs to a treated item of its condition, and carries that item's payload."""
    owner, known = tables.owners, tables.owners >= 0
    yield from rows_where(~known, _FILE, "items.parquet has no such item and arm")
    if not len(tables.items):
        return
    other = known & (tables.of_owner("condition") != tables.codes("condition")[0])
    yield from rows_where(other, _FILE, "its condition is not that of its item")
    role, roles = _codes(tables.items["role"])
    treated = np.array([name == "treated" for name in roles], dtype=bool)[role][owner]
    yield from rows_where(known & ~treated, _FILE, "its item is not a treated one")
    theirs, mine = _payload_numbers(tables.items)[owner], _payload_numbers(tables.insertions)
    wrong = known & tables.is_kind(*_WITH_PAYLOAD) & (theirs != mine)
    yield from rows_where(wrong, _FILE, "its payload is not that of its item")


def _payloads(tables: Tables) -> Iterator[Finding]:
    """Payload numbers exist, and lengths and hashes are those of the stored tokens."""
    lengths, hashes = tables.payload_lengths, np.frombuffer(b"".join(tables.payload_hashes), dtype=np.uint64).reshape(-1, 2)
    number = _payload_numbers(tables.insertions)
    missing = number >= len(hashes)
    yield from rows_where(missing, _FILE, f"its payload is not among the {len(hashes)} stored ones")
    stored = np.flatnonzero((number >= 0) & ~missing)
    wrong = np.zeros(len(number), dtype=bool)
    wrong[stored] = lengths[number[stored]] != tables.column("length")[stored]
    yield from rows_where(wrong, _FILE, "its length is not that of its payload")
    recorded, is_null = _binaries(tables.insertions["payload_hash"])
    wrong = np.zeros(len(number), dtype=bool)
    wrong[stored] = is_null[stored] | np.any(recorded[stored] != hashes[number[stored]], axis=1)
    yield from rows_where(wrong, _FILE, "its payload's tokens in payloads.bin do not have the recorded hash")
    number = _payload_numbers(tables.items)
    known = (number >= 0) & (number < len(hashes))
    wrong = number >= len(hashes)
    wrong[known] = lengths[number[known]] != tables.items["num_tokens"].to_numpy()[known]
    yield from rows_where(wrong, "items.parquet", "its payload is not stored or has another length")


def _overlaps(tables: Tables) -> Iterator[Finding]:
    """No two token copies share a position, no two swaps a slot; an exclusive insertion and a splice are alone in their slots."""
    slot, layer = tables.column("slot"), tables.column("layer")
    start = slot.astype(np.uint64) * np.uint64(tables.manifest.geometry.sequence_length) + tables.column("offset").astype(np.uint64)
    written = np.flatnonzero(layer == LAYERS["tokens"])
    order = written[np.argsort(start[written], kind="stable")]
    end = start + tables.column("length").astype(np.uint64)
    overlapping = np.zeros(len(slot), dtype=bool)
    overlapping[order[1:]] = start[order][1:] < end[order][:-1]
    yield from rows_where(overlapping, _FILE, "it overlaps the token insertion before it")
    swaps = np.flatnonzero(layer == LAYERS["swap"])
    twice = np.zeros(len(slot), dtype=bool)
    twice[swaps[1:]] = slot[swaps][1:] == slot[swaps][:-1]
    yield from rows_where(twice, _FILE, "a second swap of the same slot")
    slots, sizes = np.unique(slot, return_counts=True)
    shared = slots[sizes > 1]
    for wants, why in ((tables.column("exclusive").astype(bool), "exclusive"), (tables.is_kind("splice"), "a splice")):
        alone = np.flatnonzero(wants)
        crowded = np.zeros(len(slot), dtype=bool)
        crowded[alone] = np.isin(slot[alone], shared)
        yield from rows_where(crowded, _FILE, f"it is {why}, but something else touches its slot")


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    encoded = column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of no or several chunks, by version
        encoded = pa.concat_arrays(encoded.chunks) if encoded.num_chunks else pa.array([], column.type)
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _groups(table: pa.Table, numbers: dict[tuple[str, str], int]) -> np.ndarray:
    """int64: for each row the number of its (experiment, arm); new ones are added to `numbers`."""
    experiment, experiments = _codes(table["experiment"])
    arm, arms = _codes(table["arm"])
    present, inverse = np.unique(experiment * max(len(arms), 1) + arm, return_inverse=True)
    names = [(experiments[code // len(arms)], arms[code % len(arms)]) for code in present.tolist()]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)[inverse]


def _payload_numbers(table: pa.Table) -> np.ndarray:
    """int64: the payload of each row, -1 where there is none."""
    column = table["payload"].combine_chunks()
    return np.where(pc.is_valid(column).to_numpy(zero_copy_only=False), pc.fill_null(column, 0).to_numpy().astype(np.int64), -1)


def _binaries(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [rows, 2] of 16-byte values, and whether each is null."""
    parts = [np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, 2)[chunk.offset :][: len(chunk)] for chunk in column.chunks]
    return np.concatenate([np.empty((0, 2), np.uint64), *parts]), pc.is_null(column).to_numpy()


def _is_sorted(*keys: np.ndarray) -> bool:
    """Whether rows are in order of the first key, then the second, ..."""
    tied = np.ones(max(len(keys[0]) - 1, 0), dtype=bool)
    for key in keys:
        if np.any(tied & (key[1:] < key[:-1])):
            return False
        tied &= key[1:] == key[:-1]
    return True


ROW_CHECKS: tuple[Callable[[Tables], Iterator[Finding]], ...] = (_rows, _identities, _items, _payloads, _overlaps)
