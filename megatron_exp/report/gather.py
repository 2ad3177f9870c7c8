"""What a report is made of, read from disk and checked to belong together."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_exp.checkpoint.catalogue import is_finished
from megatron_exp.control.segments import read_segments, segment_rows
from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import RESULTS
from megatron_exp.run_record import History, RunRecord

_OF_WRITTEN = ["experiment", "condition", "item", "arm", "probe", "model", "step", "text"]
_KEY = ["experiment", "condition", "outcome", "step"]


@dataclass(frozen=True, eq=False)
class Results:
    """Everything `eval` found. table: RESULTS columns over all evaluated states. file: the newest results table, for provenance."""

    table: pa.Table
    file: Path | None
    record: dict[str, Any]

    def of(self, experiment: str) -> list[dict[str, Any]]:
        """The rows of one experiment, in the order of the table."""
        return self.table.filter(pc.equal(self.table["experiment"].cast(pa.string()), experiment)).to_pylist()


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """A run, its twin (if given), the manifest of both, and the results so far."""

    run: RunRecord
    twin: RunRecord | None
    manifest: Manifest
    results: Results

    @cached_property
    def history(self) -> History:
        return self.run.history()

    @cached_property
    def twin_history(self) -> History:
        """Empty without a twin."""
        return self.twin.history() if self.twin else History((), 0)

    @cached_property
    def insertions(self) -> pa.Table:
        """What this run was to see: nothing for a baseline, else the plan without masked experiments, and what controllers have handed out."""
        table = self.manifest.insertions()
        if self.run.baseline:
            return table.slice(0, 0)
        masked = pa.array(sorted(self.run.masked), pa.string())
        planned = table.filter(pc.invert(pc.is_in(table["experiment"].cast(pa.string()), value_set=masked)))
        return pa.concat_tables([planned, self.handed_out.select(planned.schema.names)]).unify_dictionaries()

    @cached_property
    def handed_out(self) -> pa.Table:
        """SEGMENTS: what controllers have inserted in this run so far."""
        return segment_rows([] if self.run.baseline else read_segments(self.run.path, self.manifest.fingerprint))

    @cached_property
    def written(self) -> pa.Table | None:
        """The responses of the newest evaluation that are texts, None where there is none. UserError where they cannot be read."""
        if self.results.file is None or not (path := self.results.file.with_name("responses.parquet")).exists():
            return None
        try:
            table = pq.read_table(path, columns=_OF_WRITTEN)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}). The responses are damaged: evaluate the run again.") from error
        return table.filter(pc.is_valid(table["text"]))

    @property
    def last_step(self) -> int:
        return self.history.last_step

    @property
    def finished(self) -> bool:
        return is_finished(self.run)


def gather(run_dir: Path, against: Path | None) -> Inputs:
    """Open everything; UserError where a part is missing, damaged, or belongs to another run."""
    run = RunRecord.open(run_dir)
    manifest = run.open_manifest()
    twin = _twin(run, against) if against is not None else None
    return Inputs(run=run, twin=twin, manifest=manifest, results=read_results(run))


def _twin(run: RunRecord, path: Path) -> RunRecord:
    twin = RunRecord.open(path)
    if not twin.baseline:
        raise UserError(
            f"{twin.path} is not a twin of {run.path}: it is no baseline run. Give the run made with `train --baseline`, or leave --against out."
        )
    mine, theirs = run.pairing, twin.pairing
    different = [name for name in mine if mine[name] != theirs[name]]
    if different:
        raise UserError(
            f"{twin.path} is not a twin of {run.path}: they differ in {', '.join(different)}. A twin is the same run with the experiments off; "
            "train one with `train --baseline` on the same manifest, or leave --against out."
        )
    return twin


def read_results(run: RunRecord) -> Results:
    """The union of RUN/evals/step-*/results.parquet; where two evaluations hold the same row, the later state's file counts."""
    tables: list[pa.Table] = []
    seen: set[tuple[Any, ...]] = set()
    directories = sorted(path.parent for path in (run.path / "evals").glob("step-*/results.parquet"))
    for directory in reversed(directories):
        table = _results_table(directory / "results.parquet")
        keys = list(zip(*(table[name].to_pylist() for name in _KEY), strict=True))
        tables.append(table.filter(pa.array([key not in seen for key in keys], pa.bool_())))
        seen.update(keys)
    if not directories:
        return Results(RESULTS.empty_table(), None, {})
    return Results(pa.concat_tables(reversed(tables)), directories[-1] / "results.parquet", _results_record(directories[-1], run))


def _results_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). The results are damaged: evaluate the run again.") from error
    if set(table.column_names) != set(RESULTS.names):
        raise UserError(
            f"{path} has columns {table.column_names}, expected {RESULTS.names}. It was written by another version: evaluate the run again."
        )
    return table.select(RESULTS.names).cast(RESULTS)


def _results_record(directory: Path, run: RunRecord) -> dict[str, Any]:
    path = require_file(directory / "results.json", "the record of the results")
    record = orjson.loads(path.read_bytes())
    planned = record.get("manifest", {}).get("fingerprint", run.manifest_fingerprint)
    if planned != run.manifest_fingerprint:
        raise UserError(
            f"{path} holds results of a manifest with fingerprint {planned[:12]}, but the run was trained on {run.manifest_fingerprint[:12]}. "
            "Evaluate this run again."
        )
    return record
