"""The reserve of a manifest: every controller has its places, nothing else lies there, and every item of its bank fits each of them."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from megatron_exp.inspection.findings import Finding, rows_where
from megatron_exp.inspection.verify_rows import Tables
from megatron_exp.manifest.schema import LAYERS

RESERVE_FILE, BANK_FILE = "reserve.parquet", "bank.parquet"


def _places(tables: Tables) -> Iterator[Finding]:
    """Each controller's places are there in order, inside their slots and their intervals."""
    reserve, geometry = tables.written.reserve, tables.manifest.geometry
    names = _texts(reserve["experiment"])
    columns = {name: reserve[name].to_numpy().astype(np.int64) for name in ("interval", "number", "step", "row", "offset", "length")}
    slot = reserve["slot"].to_numpy()
    wrong_step = (slot // np.uint64(geometry.global_batch_size) != columns["step"]) | (slot >= np.uint64(geometry.num_slots))
    yield from rows_where(wrong_step, RESERVE_FILE, "its step is not slot // global batch size, or outside the run")
    yield from rows_where(slot % np.uint64(geometry.global_batch_size) != columns["row"], RESERVE_FILE, "its row is not that of its slot")
    outside = (columns["length"] < 1) | (columns["offset"] + columns["length"] > geometry.sequence_length)
    yield from rows_where(outside, RESERVE_FILE, f"it does not lie inside the slot's {geometry.sequence_length} tokens")
    for name, one in tables.manifest.controllers.items():
        mine = np.flatnonzero(names == name)
        expected = np.repeat(np.arange(one["intervals"]), one["largest"]), np.tile(np.arange(one["largest"]), one["intervals"])
        if len(mine) != len(expected[0]) or any(
            (columns[key][mine] != values).any() for key, values in zip(("interval", "number"), expected, strict=True)
        ):
            yield Finding(RESERVE_FILE, f"experiment {name} has other places than {one['largest']} in each of {one['intervals']} intervals")
        late = np.zeros(len(names), dtype=bool)
        late[mine] = columns["step"][mine] // one["interval"] != columns["interval"][mine]
        yield from rows_where(late, RESERVE_FILE, "its step is outside its interval")


def _collisions(tables: Tables) -> Iterator[Finding]:
    """No reserved place shares a position with another or with a token insertion, or a slot with what needs its slot for itself."""
    reserve, length = tables.written.reserve, np.uint64(tables.manifest.geometry.sequence_length)
    slot = reserve["slot"].to_numpy()
    written = np.flatnonzero(tables.column("layer") == LAYERS["tokens"])
    slots = np.concatenate([slot, tables.column("slot")[written]])
    offsets = np.concatenate([reserve["offset"].to_numpy(), tables.column("offset")[written]])
    lengths = np.concatenate([reserve["length"].to_numpy(), tables.column("length")[written]])
    start = slots * length + offsets.astype(np.uint64)
    order = np.argsort(start, kind="stable")
    overlaps = start[order][1:] < (start + lengths.astype(np.uint64))[order][:-1]
    hit = np.zeros(len(start), dtype=bool)
    hit[order[1:][overlaps]] = hit[order[:-1][overlaps]] = True
    yield from rows_where(hit[: len(slot)], RESERVE_FILE, "it overlaps another reserved place or a token insertion")
    alone = tables.column("slot")[tables.column("exclusive").astype(bool) | tables.is_kind("splice")]
    yield from rows_where(np.isin(slot, alone), RESERVE_FILE, "something in its slot needs the slot for itself")


def _banks(tables: Tables) -> Iterator[Finding]:
    """Bank rows are treated items with their payloads, numbered from 0, and none is longer than a reserved place."""
    bank = tables.written.bank
    known = (
        {
            (row["experiment"], row["item"], row["arm"]): (row["condition"], row["payload"], row["num_tokens"])
            for row in tables.items.select(["experiment", "item", "arm", "condition", "payload", "num_tokens", "role"]).to_pylist()
            if row["role"] == "treated"
        }
        if len(bank)
        else {}
    )
    rows = bank.to_pylist()
    other = [known.get((row["experiment"], row["item"], row["arm"])) != (row["condition"], row["payload"], row["length"]) for row in rows]
    yield from rows_where(np.array(other, dtype=bool), BANK_FILE, "items.parquet has no such treated item with this payload")
    hashes = tables.payload_hashes
    changed = [row["payload"] >= len(hashes) or row["payload_hash"] != hashes[row["payload"]] for row in rows]
    yield from rows_where(np.array(changed, dtype=bool), BANK_FILE, "its payload's tokens in payloads.bin do not have the recorded hash")
    names, reserved = _texts(bank["experiment"]), _texts(tables.written.reserve["experiment"])
    for name, one in tables.manifest.controllers.items():
        mine = np.flatnonzero(names == name)
        if bank["position"].to_numpy()[mine].tolist() != list(range(one["bank_size"])):
            yield Finding(BANK_FILE, f"experiment {name} has other items than the {one['bank_size']} of its controller")
        room = tables.written.reserve["length"].to_numpy()[reserved == name].min(initial=np.iinfo(np.uint32).max)
        long = np.zeros(len(names), dtype=bool)
        long[mine] = bank["length"].to_numpy()[mine] > room
        yield from rows_where(long, BANK_FILE, "it is longer than a place of the reserve")


def _texts(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.string()).to_numpy(zero_copy_only=False)


RESERVE_CHECKS: tuple[Callable[[Tables], Iterator[Finding]], ...] = (_places, _collisions, _banks)
