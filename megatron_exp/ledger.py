"""The ledger: what was really fed to the model, one fixed record for every step of every attempt.

The trainer hashes each slot as it went into the model; `verify` makes the same hashes again from shards and manifest. A run that was
killed and resumed has several attempts; of a step done twice, the last attempt counts, because its weights are the ones that live on.

    file    header (38 bytes), then records of 38 bytes, little-endian, each with a CRC-32 of its first 34 bytes
    record  attempt u16 | step u32 | first_slot u64 | num_slots u32 | hash 16 bytes | crc32 u32

A process can die while it writes, so a torn tail is normal: readers leave it out and the next attempt cuts it off.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_exp.errors import UserError
from megatron_exp.files import append_whole, require_file, sync_file, write_file

SCHEMA_VERSION = 1

RECORD = np.dtype([("attempt", "<u2"), ("step", "<u4"), ("first_slot", "<u8"), ("num_slots", "<u4"), ("hash", "V16"), ("crc32", "<u4")])
_CHECKED_BYTES = RECORD.itemsize - 4
_MAGIC = b"MEXP-LEDGER\0"


def slot_hash(slot: int, tokens: np.ndarray, loss_mask: np.ndarray) -> int:
    """xxh3_64 of the slot id, tokens [S + 1] and loss mask [S]; the same whatever integer types they are stored in."""
    digest = xxhash.xxh3_64(int(slot).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
    digest.update(np.ascontiguousarray(loss_mask, dtype=np.uint8).data)
    return digest.intdigest()


def step_hash(slot_hashes: Iterable[int] | np.ndarray) -> bytes:
    """16 bytes: xxh3_128 of the slot hashes (uint64) in slot order."""
    hashes = slot_hashes if isinstance(slot_hashes, np.ndarray) else np.fromiter(slot_hashes, dtype=np.uint64)
    return xxhash.xxh3_128_digest(hashes.astype("<u8").tobytes())


@dataclass(frozen=True)
class Entry:
    """One step as consumed: slots [first_slot, first_slot + num_slots) in `attempt`, and the hash of what they held."""

    attempt: int
    step: int
    first_slot: int
    num_slots: int
    hash: bytes


@dataclass(frozen=True, eq=False)
class Ledger:
    """A ledger as read.

    records: the sound records (dtype RECORD) in the order written. damaged: numbers of records, counted from 0 in the file,
    whose CRC is wrong although sound ones follow. torn_bytes: bytes at the end that make no sound record.
    """

    records: np.ndarray
    damaged: tuple[int, ...]
    torn_bytes: int

    def steps(self) -> list[Entry]:
        """The last attempt of every step, in step order."""
        order = np.lexsort((np.arange(len(self.records)), self.records["attempt"], self.records["step"]))
        ordered = self.records[order]
        is_last = np.append(ordered["step"][1:] != ordered["step"][:-1], True)[: len(ordered)]
        return [
            Entry(int(one["attempt"]), int(one["step"]), int(one["first_slot"]), int(one["num_slots"]), one["hash"].tobytes())
            for one in ordered[is_last]
        ]


def read_ledger(path: Path) -> Ledger:
    """Read a ledger, leaving out a torn tail; UserError where the file is missing or is no ledger."""
    data = require_file(path, "the ledger of a run").read_bytes()
    if data[: RECORD.itemsize] != _header():
        raise UserError(
            f"{path} does not begin like a ledger of version {SCHEMA_VERSION}: it is damaged or of another program. Do not trust its steps."
        )
    body = data[RECORD.itemsize :]
    records = np.frombuffer(body, dtype=RECORD, count=len(body) // RECORD.itemsize)
    sound = np.fromiter((_crc(record.tobytes()) == int(record["crc32"]) for record in records), dtype=bool, count=len(records))
    num_kept = int(np.flatnonzero(sound)[-1]) + 1 if sound.any() else 0
    damaged = tuple(int(number) for number in np.flatnonzero(~sound[:num_kept]))
    return Ledger(records[:num_kept][sound[:num_kept]].copy(), damaged, len(body) - num_kept * RECORD.itemsize)


class LedgerWriter:
    """Appends steps to a ledger. A record is with the operating system after `append` and on disk after `sync`."""

    def __init__(self, path: Path):
        self._path = Path(path)
        if not self._path.exists():
            write_file(self._path, _header())
        size = self._path.stat().st_size
        if torn_bytes := read_ledger(self._path).torn_bytes:
            os.truncate(self._path, size - torn_bytes)
        # Each record goes behind whatever is the end by then: another attempt that was believed dead may have added some.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def append(self, entry: Entry) -> None:
        """Add one step."""
        record = np.zeros((), dtype=RECORD)
        record["attempt"], record["step"] = entry.attempt, entry.step
        record["first_slot"], record["num_slots"] = entry.first_slot, entry.num_slots
        record["hash"] = np.void(entry.hash)
        record["crc32"] = _crc(record.tobytes())
        append_whole(self._file, record.tobytes())

    def sync(self) -> None:
        """Make all steps so far durable."""
        sync_file(self._path)

    def close(self) -> None:
        """Make all steps durable and end."""
        self.sync()
        self._file.close()


def _crc(record: bytes) -> int:
    return zlib.crc32(record[:_CHECKED_BYTES])


def _header() -> bytes:
    content = (_MAGIC + SCHEMA_VERSION.to_bytes(2, "little")).ljust(_CHECKED_BYTES, b"\0")
    return content + _crc(content).to_bytes(4, "little")
