"""Segments: one file for every model state in which something was decided, each holding the fingerprint of the one before.

    RUN/segments/0000.parquet   rows: the insertions decided (SEGMENTS); metadata: number, step, decisions, previous, fingerprint

The fingerprint covers content, not bytes, and the first `previous` is that of the manifest. So nobody can change, drop or exchange a decision
without breaking the chain, and a segment made again offline is the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_exp import fingerprint
from megatron_exp.control.loop import State
from megatron_exp.errors import UserError
from megatron_exp.manifest.schema import SCHEMA_VERSION, SEGMENTS

DIRECTORY = "segments"
_KEY = b"segment"


@dataclass(frozen=True, eq=False)
class Segment:
    """What was decided in the model state `step`. decisions: by experiment. previous: fingerprint of segment `number` - 1, or of the manifest."""

    number: int
    step: int
    decisions: Mapping[str, State]
    rows: pa.Table
    previous: str

    @property
    def fingerprint(self) -> str:
        """Of the content and of all segments before."""
        return fingerprint.of_json([self._record(), fingerprint.of_table(self.rows)])

    def _record(self) -> dict[str, Any]:
        decisions = {name: state.record() for name, state in sorted(self.decisions.items())}
        return {"number": self.number, "step": self.step, "decisions": decisions, "previous": self.previous}

    def encode(self) -> bytes:
        """The content of its file; the same segment always gives the same bytes with the same pyarrow."""
        metadata = orjson.dumps({**self._record(), "schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint})
        sink = pa.BufferOutputStream()
        # Arrow would store its schema with the metadata in it once more, and a change of one of the two would not be seen.
        with pq.ParquetWriter(sink, self.rows.schema.remove_metadata(), compression="zstd", store_schema=False) as writer:
            writer.write_table(self.rows)
            writer.add_key_value_metadata({_KEY.decode(): metadata.decode()})
        return bytes(sink.getvalue())


def segment_path(run_dir: Path, number: int) -> Path:
    """Where a segment lies."""
    return Path(run_dir) / DIRECTORY / f"{number:04d}.parquet"


def decode(data: bytes, place: Path) -> Segment:
    """A segment from the content of its file at `place`; UserError where it is damaged or changed."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table, record = file.read(), orjson.loads((file.metadata.metadata or {})[_KEY])
        decisions = {name: State.of(state) for name, state in record["decisions"].items()}
        segment = Segment(record["number"], record["step"], decisions, table.cast(SEGMENTS), record["previous"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _refusal(place, f"it cannot be read as a segment ({' '.join(str(error).split())})") from error
    if record.get("schema_version") != SCHEMA_VERSION:
        raise _refusal(place, f"it has schema version {record.get('schema_version')}, this program reads {SCHEMA_VERSION}")
    if segment.fingerprint != record["fingerprint"]:
        raise _refusal(place, "its content has another fingerprint than it records: it was changed after it was written")
    return segment


def read_segments(run_dir: Path, origin: str) -> list[Segment]:
    """All segments of a run in order; `origin` is the fingerprint of its manifest. Empty where nothing was decided.

    Raises UserError that names the first segment that is missing, damaged, or no successor of the one before.
    """
    paths = sorted((Path(run_dir) / DIRECTORY).glob("*.parquet"))
    segments: list[Segment] = []
    previous = origin
    for number, path in enumerate(paths):
        expected = segment_path(run_dir, number)
        if path != expected:
            raise _refusal(path, f"{expected.name} is missing before it")
        segment = decode(path.read_bytes(), path)
        if segment.number != number or segment.previous != previous:
            before = f"segment {number - 1:04d}" if number else "the run's manifest"
            raise _refusal(path, f"it does not follow {before}: it names {segment.previous[:12]} as the one before it, not {previous[:12]}")
        segments.append(segment)
        previous = segment.fingerprint
    return segments


def segment_rows(segments: Iterable[Segment]) -> pa.Table:
    """SEGMENTS: everything that was handed out."""
    return pa.concat_tables([SEGMENTS.empty_table(), *(segment.rows for segment in segments)]).unify_dictionaries().combine_chunks()


def handed_out(segments: Iterable[Segment], state: int) -> dict[str, dict[str, int]]:
    """{experiment: {decisions, copies, tokens}}: what was inserted in the steps before a model state, by those whose controllers had decided."""
    found: dict[str, dict[str, int]] = {}
    for segment in segments:
        for name in segment.decisions if segment.step < state else ():
            one = found.setdefault(name, {"decisions": 0, "copies": 0, "tokens": 0})
            is_mine = pc.equal(segment.rows["experiment"].cast(pa.string()), name)
            rows = segment.rows.filter(pc.and_(is_mine, pc.less(segment.rows["step"], state)))
            one["decisions"] += 1
            one["copies"] += len(rows)
            one["tokens"] += pc.sum(rows["length"]).as_py() or 0
    return found


def _refusal(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: {found}. Restore it from a copy. Without one, move it and all later segments away: training writes again what the checkpoint covers, "
        "and decides anew what comes after it."
    )
