"""`export`: the tables of a report as files for a paper or for other tools."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from megatron_exp.errors import UserError
from megatron_exp.report.formats import encode
from megatron_exp.report.gather import Inputs, gather
from megatron_exp.report.inserted import inserted_rows
from megatron_exp.report.overview import primary_rows

_PRIMARY = (
    "experiment outcome condition step n num_clusters num_unscored estimate low high level control twin difference p p_corrected mde test verdict scope"
).split()
_CURVES = ("loss", "validation_loss", "grad_norm", "learning_rate")


def export(run_dir: Path, table: str, kind: str, against: Path | None = None) -> bytes:
    """One table of a run in one format.

    Args:
        run_dir: RUN.
        table: a name of TABLES.
        kind: the format.
        against: the twin, for `dynamics`.

    Raises:
        UserError: for an unknown table or format, or a run whose parts do not belong together.
    """
    if table not in TABLES:
        raise UserError(f"There is no table {table!r} to export. Choose one of {', '.join(TABLES)}.")
    return encode(TABLES[table](gather(run_dir, against)), kind)


def _primary(inputs: Inputs) -> pa.Table:
    """The rows that carry the primary verdicts, experiments in the manifest's order."""
    rows = [row for name in inputs.manifest.experiments for row in primary_rows(inputs.results.of(name))]
    return pa.table({name: pa.array([row[name] for row in rows], inputs.results.table.schema.field(name).type) for name in _PRIMARY})


def _results(inputs: Inputs) -> pa.Table:
    """Every row of results, of all evaluated states."""
    return inputs.results.table


def _inserted(inputs: Inputs) -> pa.Table:
    """What each condition inserts, as planned."""
    return pa.Table.from_pylist([asdict(row) for row in inserted_rows(inputs)])


def _dynamics(inputs: Inputs) -> pa.Table:
    """Loss, validation loss and gradient norm at every state, of run and twin."""
    columns: dict[str, dict[int, float]] = {}
    for model, history in (("run", inputs.history), ("twin", inputs.twin_history)):
        for name in _CURVES:
            series = history.series(name)
            if len(series):
                columns[f"{model}_{name}"] = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    steps = sorted({step for column in columns.values() for step in column})
    values = {name: pa.array([column.get(step) for step in steps], pa.float64()) for name, column in columns.items()}
    return pa.table({"step": pa.array(steps, pa.int64()), **values})


TABLES: dict[str, Callable[[Inputs], pa.Table]] = {"primary": _primary, "results": _results, "inserted": _inserted, "dynamics": _dynamics}
