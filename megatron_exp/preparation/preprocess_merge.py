"""Finished units become shards: units in input order, each source by itself, whole documents, bounded memory.

Which documents a shard holds is decided from lengths alone, before anything is copied; so shards are written independently
of each other, by any number of workers, and those already written are kept when a job continues.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.preparation.corpus_job import WorkFolder
from megatron_exp.preparation.preprocess_progress import Counters
from megatron_exp.preparation.preprocess_unit import UnitFiles, unit_sums
from megatron_exp.shards.checksums import read_checked
from megatron_exp.shards.documents import ROW_GROUP, DocumentMapWriter, read_documents
from megatron_exp.shards.indexed import IndexedWriter
from megatron_exp.shards.verify import SUMMED_SUFFIXES


class Piece(NamedTuple):
    """Documents [first, last) of a unit, which are its bytes [start, stop). record: the unit's done-record, without ledgers."""

    record: dict[str, Any]
    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    """A shard to write and the pieces it is made of."""

    name: str
    source: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def key(self) -> str:
        """Of everything the shard's bytes follow from."""
        content = [[piece.record["bin"]["root"], piece.record["docs"]["root"], piece.first, piece.last] for piece in self.pieces]
        return fingerprint.of_json([self.name, self.source, content])


def plan_shards(records: Iterable[dict[str, Any]], directory: Path, itemsize: int, shard_size: int) -> list[ShardPlan]:
    """The shards of all units, given as done-records in input order.

    A shard ends before the document that would make it larger than `shard_size` bytes; a document larger than that has a
    shard of its own. Sources follow each other in the order of their first file.
    """
    by_source: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["num_documents"]:
            slim = {name: value for name, value in record.items() if name != "ledgers"}
            by_source.setdefault(record["source"], []).append(slim)
    plans: list[ShardPlan] = []
    for source, members in by_source.items():
        for pieces in _filled(members, directory, itemsize, shard_size):
            plans.append(ShardPlan(f"shard-{len(plans):05d}", source, tuple(pieces)))
    return plans


def _filled(records: Sequence[dict[str, Any]], directory: Path, itemsize: int, shard_size: int) -> list[list[Piece]]:
    """Pieces per shard of one source."""
    shards: list[list[Piece]] = [[]]
    room = shard_size
    for record in records:
        lengths = read_documents(UnitFiles(directory, record["key"]).documents, columns=["num_tokens"])["num_tokens"].to_numpy()
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * itemsize
        first = 0
        while first < len(lengths):
            last = int(np.searchsorted(ends, int(ends[first]) + room, side="right")) - 1
            if last <= first:
                if shards[-1]:
                    shards.append([])
                    room = shard_size
                    continue
                last = first + 1
            shards[-1].append(Piece(record, first, last, int(ends[first]), int(ends[last])))
            room -= int(ends[last] - ends[first])
            first = last
    return shards


@dataclass(frozen=True)
class MergeWork:
    """Writing shards (`preprocess_workers.Work`). output: the corpus; directory: its units."""

    output: Path
    directory: Path
    dtype: np.dtype

    def open(self, counters: Counters) -> Callable[[ShardPlan], None]:
        return lambda plan: self._write(plan, counters)

    def _write(self, plan: ShardPlan, counters: Counters) -> None:
        prefix = self.output / plan.name
        writer = IndexedWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), self.dtype)
        rows = DocumentMapWriter(Path(f"{prefix}.docs.parquet"))
        try:
            for piece in plan.pieces:
                self._copy(piece, writer, rows, counters)
            docs_sum = rows.close()
            writer.close()
        except BaseException:
            rows.abandon()
            writer.abandon()
            raise
        assert writer.bin_sum is not None and writer.idx_sum is not None
        record = {
            "key": plan.key,
            "name": plan.name,
            "source": plan.source,
            "num_tokens": writer.num_bytes // writer.dtype.itemsize,
            "num_documents": writer.num_documents,
        }
        WorkFolder(self.output).keep_shard(record, dict(zip(SUMMED_SUFFIXES, (writer.bin_sum, writer.idx_sum, docs_sum), strict=True)))

    def _copy(self, piece: Piece, writer: IndexedWriter, rows: DocumentMapWriter, counters: Counters) -> None:
        files = UnitFiles(self.directory, piece.record["key"])
        for block in read_checked(files.tokens, piece.start, piece.stop, unit_sums(files, piece.record)):
            writer.add_stored(block)
            counters.add(read_bytes=len(block), tokens=len(block) // self.dtype.itemsize)
        for start in range(piece.first, piece.last, ROW_GROUP):
            table = read_documents(files.documents, start, min(start + ROW_GROUP, piece.last))
            writer.add_lengths(table["num_tokens"].to_numpy())
            rows.add(table)
