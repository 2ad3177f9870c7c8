"""Hashes of what insertions stand in the place of: a pass over the shards of its own, since planning reads none of these tokens."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.files import durable_file, refuse_existing
from megatron_exp.inspection.findings import Finding, rows_where
from megatron_exp.inspection.targets import Target
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.manifest.stored_table import read_stored
from megatron_exp.stream.base import Stream

SCHEMA = pa.schema([("insertion_id", pa.uint64()), ("base_hash", pa.binary(16))])
_PLAN_KEY = b"plan"
_INSERTIONS_FILE = "insertions.parquet"


def base_hashes(target: Target) -> pa.Table:
    """SCHEMA, one row per insertion in the order of the insertions table.

    The hash is the xxh3_128 of the base stream's tokens (int32) at the positions that the insertion covers; for a splice, from its offset to the end
    of the slot, since all of that moves. Shards are read in order, each stretch once.
    """
    manifest, stream = target.manifest, target.overlay.stream
    insertions, length = manifest.insertions(), manifest.geometry.sequence_length
    slots, row_slot = np.unique(insertions["slot"].to_numpy(), return_inverse=True)
    shards, starts = _places(stream, slots)
    first = insertions["offset"].to_numpy().astype(np.int64)
    is_splice = np.array([kind == "splice" for kind in insertions["kind"].to_pylist()], dtype=bool)
    end = np.where(is_splice, length, first + insertions["length"].to_numpy())
    hashes = np.empty((len(insertions), 16), dtype=np.uint8)
    for row in np.lexsort((first, starts[row_slot], shards[row_slot])).tolist():
        slot = row_slot[row]
        tokens = stream.corpus.tokens(int(shards[slot]))[starts[slot] + first[row] : starts[slot] + end[row]]
        hashes[row] = np.frombuffer(payload_hash(tokens), dtype=np.uint8)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(hashes), [None, pa.py_buffer(hashes.tobytes())])
    return pa.table({"insertion_id": insertions["insertion_id"], "base_hash": column}, schema=SCHEMA)


def write_base_hashes(target: Target, out: Path) -> int:
    """Write the hashes to a file of their own (manifests are never edited); how many."""
    refuse_existing(out)
    table = base_hashes(target).replace_schema_metadata({_PLAN_KEY: target.manifest.fingerprint})
    with durable_file(Path(out)) as file:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        file.write(memoryview(sink.getvalue()))
    return len(table)


def compare_base_hashes(target: Target, path: Path) -> list[Finding]:
    """Insertions whose base tokens are not those that were hashed; UserError where the file is of another manifest or unreadable."""
    stored = _read(path)
    planned = (stored.schema.metadata or {}).get(_PLAN_KEY, b"").decode()
    if planned != target.manifest.fingerprint:
        raise UserError(
            f"{path} holds the hashes of the manifest with fingerprint {planned[:12] or 'unknown'}, not of {target.manifest.path} "
            f"({target.manifest.fingerprint[:12]}). Give the file that was written for this manifest."
        )
    now = base_hashes(target)
    if not stored["insertion_id"].equals(now["insertion_id"]):
        return [Finding(str(path), f"its rows are not those of {_INSERTIONS_FILE}: it was changed or cut short")]
    differs = np.array([one != other for one, other in zip(stored["base_hash"].to_pylist(), now["base_hash"].to_pylist(), strict=True)])
    return list(
        rows_where(differs, _INSERTIONS_FILE, "the tokens of the corpus that it stands in the place of are not those that were hashed")
    )


def _read(path: Path) -> pa.Table:
    return read_stored(
        path,
        SCHEMA,
        "hashes of base tokens",
        if_damaged="It is damaged: write it again with --base-out",
        if_other="Give a file that --base-out wrote",
    )


def _places(stream: Stream, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 shard and int64 offset of each slot's base content."""
    shards, offsets = np.empty(len(slots), np.int32), np.empty(len(slots), np.int64)
    for index, slot in enumerate(slots.tolist()):
        _, _, _, shards[index], offsets[index] = stream.instance(slot)
    return shards, offsets
